"""What runs a layer's part of a step: the references on the host, or the kernels of a GPU."""
