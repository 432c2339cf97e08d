"""Engines of vLLM driven from outside: to answer, to read, to look into, with swapped budgets."""
