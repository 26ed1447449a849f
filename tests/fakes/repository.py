"""Where the repository is, of which some tests look at more than the package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
