"""Strategies whose tensors are in host memory and pass through the device in chunks."""
