"""What is served: options, the plan made of them, what can be served and what cannot; no vLLM."""
