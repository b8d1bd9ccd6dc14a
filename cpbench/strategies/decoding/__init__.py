"""Strategies of batches that are decoded, whose ranks divide the cache by heads."""
