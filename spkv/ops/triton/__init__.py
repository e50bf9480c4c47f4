"""Triton kernels (CUDA, or Triton's interpreter for tests). Importing this package does not import Triton."""
