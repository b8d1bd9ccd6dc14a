"""Public layouts, the assignment of tokens to ranks: see :mod:`cpbench.parallel.layout`."""

from cpbench.parallel.layout import Layout, build

__all__ = ["Layout", "build"]
