"""What runs in the worker: the attention backend, the caches, one step of a layer."""
