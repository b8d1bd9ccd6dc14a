"""Operator `bands`: exact attention for any mask, on CPU and CUDA."""
