"""Recommendations: as text, as a page, as a figure."""
