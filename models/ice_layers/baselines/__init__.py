"""Completion without a network: means, lines, ridge regression and kriging."""
