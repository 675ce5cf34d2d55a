"""What the Triton kernels of several ops are made of."""
