"""Checks of results against float64, and the quality of selections."""
