"""Layouts, meshes, communication, traces, and the contract of context-parallel strategies."""
