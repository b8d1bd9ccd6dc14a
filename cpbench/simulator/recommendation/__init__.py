"""The search for the strategies that are fastest: candidates, bounds that rule some out, times."""
