"""Scripts that make what the repository ships; run from a checkout, never installed."""
