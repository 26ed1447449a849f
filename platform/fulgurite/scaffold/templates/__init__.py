"""Files of a new paper's package."""
