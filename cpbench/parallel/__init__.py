"""Ranks, layouts, communication, and the contract of context-parallel strategies."""
