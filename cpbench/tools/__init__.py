"""Implementations of list, traffic, links, compile, tune, doctor and status."""
