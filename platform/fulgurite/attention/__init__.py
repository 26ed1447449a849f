"""Exact attention in a memory budget."""

from fulgurite.attention.quorums import quorum

__all__ = ["quorum"]
