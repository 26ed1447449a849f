"""Number embeddings without a language model."""
