"""Sweeps that come with cpbench, as TOML files."""
