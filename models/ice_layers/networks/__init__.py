"""The completion network: features, context within layers and across them."""
