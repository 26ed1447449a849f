"""The packaged configurations (YAML), one folder per system."""
