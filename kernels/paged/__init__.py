"""Operators that decode: one query for each sequence of a batch, whose keys lie in pages."""
