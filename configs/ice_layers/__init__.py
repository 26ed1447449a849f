"""The packaged configurations of ice layers."""
