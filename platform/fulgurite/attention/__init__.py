"""Exact attention in a memory budget (Stream-CQSA), in pure PyTorch."""

from fulgurite.attention.backend import AttentionBackend, Documents, InCore, Streamed
from fulgurite.attention.functional import plan, stream_attention
from fulgurite.attention.quorums import quorum

__all__ = [
    "AttentionBackend",
    "Documents",
    "InCore",
    "Streamed",
    "plan",
    "quorum",
    "stream_attention",
]
