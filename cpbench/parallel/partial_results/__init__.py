"""Partial results of attention over disjoint keys: their accumulators and their merge."""
