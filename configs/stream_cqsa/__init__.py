"""The packaged configurations of Stream-CQSA."""
