"""Public: which rank owns which tokens; see :mod:`cpbench.parallel.layout`."""

from cpbench.parallel.layout import Layout, build

__all__ = ["Layout", "build"]
