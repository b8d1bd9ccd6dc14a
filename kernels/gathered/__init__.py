"""Operator `gathered`: attention to selected keys or blocks, in plain torch on any device."""
