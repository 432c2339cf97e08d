"""What runs in the engine core: cache groups, their managers and counts."""
