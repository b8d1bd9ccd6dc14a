"""Tensors in host memory beside a device: allocation, copies, and the memory of both sides."""
