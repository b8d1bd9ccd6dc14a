"""Code shared by selectors: base classes, selections, pooling and ranking."""
