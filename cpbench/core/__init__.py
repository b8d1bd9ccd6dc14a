"""Core definitions: problems, specs, settings, the registry and the contract of operators."""
