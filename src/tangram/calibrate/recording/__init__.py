"""From texts to statistics: stock vLLM reads with full KV, and what heads keep is gathered."""
