"""Fields of the regional climate model MAR, brought to traces and layers."""
