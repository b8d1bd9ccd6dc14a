"""Sequence mixers: attention whose softmax is replaced by a state per head, in O(S K V)."""
