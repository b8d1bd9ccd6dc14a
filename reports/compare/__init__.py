"""Comparison of runs: statistics, verdicts, and a gate for CI."""
