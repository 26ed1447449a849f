"""What several files of this folder start from."""

import pytest
import torch


@pytest.fixture
def seeded():
    """Random numbers that are the same in each run of a test."""
    torch.manual_seed(0)
