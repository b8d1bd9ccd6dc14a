"""Dispatch: every rank receives only the keys that its queries see."""
