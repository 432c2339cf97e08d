"""Plain-torch references of what several kernels do together."""
