"""The places of vLLM that are relied on, and how they are overridden; knows its version."""
