"""Completed stacks: how they are filled, what they carry, their files and figures."""
