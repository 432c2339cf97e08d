"""What runs where an engine is configured and its API is served."""
