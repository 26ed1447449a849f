"""The packaged configurations of CS-ARM-BN."""
