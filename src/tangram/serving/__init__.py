"""Servers as child processes, what they tell of themselves, and conversations played with them."""
