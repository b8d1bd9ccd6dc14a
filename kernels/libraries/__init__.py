"""Adapters: the attention kernels of other libraries as operators, one file each."""
