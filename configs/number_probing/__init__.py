"""The packaged configurations of number_probing."""
