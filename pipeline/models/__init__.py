"""Models: checking, loading, making tiny ones, fetching packaged ones, and logits at chosen positions."""
