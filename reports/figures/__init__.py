"""Figures for papers: SVG, PNG, PDF."""
