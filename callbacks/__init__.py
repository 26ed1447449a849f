"""Callbacks: when a method acts during training."""
