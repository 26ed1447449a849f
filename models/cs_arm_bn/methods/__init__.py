"""Adaptation methods, one module for each family."""
