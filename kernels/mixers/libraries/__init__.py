"""Adapters: the sequence mixers of other libraries as operators, one file each."""
