"""Sweep files, their expansion to cases, and running them."""
