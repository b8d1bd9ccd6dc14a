"""Sweep files, the cases they expand to, and running them."""
