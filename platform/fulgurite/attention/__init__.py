"""Exact attention in a memory budget (Stream-CQSA), in pure PyTorch."""

from fulgurite.attention.backend import AttentionBackend, Documents, InCore, Streamed
from fulgurite.attention.files import attend_files, attend_files_backward
from fulgurite.attention.functional import plan, stream_attention
from fulgurite.attention.jobs import AttentionJob
from fulgurite.attention.mapped import memory_mapped
from fulgurite.attention.quorums import quorum

__all__ = [
    "AttentionBackend",
    "AttentionJob",
    "Documents",
    "InCore",
    "Streamed",
    "attend_files",
    "attend_files_backward",
    "memory_mapped",
    "plan",
    "quorum",
    "stream_attention",
]
