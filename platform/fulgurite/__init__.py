"""fulgurite: research papers as plug-ins of one PyTorch Lightning trainer."""

__version__ = "0.1.0"
