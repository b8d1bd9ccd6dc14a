"""Triton kernels of the mixers with at most one decay per head and token, with and without the
delta rule."""
