"""Selectors whose branches are joined by their lse."""
