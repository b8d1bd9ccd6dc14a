"""What everything else speaks of: problems, specs, the registry, the contract of operators."""
