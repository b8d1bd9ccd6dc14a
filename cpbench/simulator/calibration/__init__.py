"""Fits of the constants of a cluster file to measurements."""
