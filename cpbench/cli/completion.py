"""Names for the shell's completion: operators, strategies, layouts, masks, sweeps and more."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def complete(kind: str) -> Callable[[str], list[str]]:
    """A function from the beginning of a list of names to the lists that it can become.

    Args:
        kind: ``"operators"``, ``"strategies"``, ``"layouts"``, ``"masks"``, ``"inputs"``,
            ``"ropes"``, ``"dtypes"``, ``"directions"`` or ``"sweeps"``.
    """

    def complete_names(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [
            f"{before}{comma}{name}"
            for name in _names(kind)
            if name.startswith(last) and name not in given
        ]

    return complete_names


def _names(kind: str) -> list[str]:
    from cpbench import inputs, masks
    from cpbench.core import registry
    from cpbench.core.problem import DIRECTIONS, DTYPES
    from cpbench.inputs import rope
    from cpbench.parallel import layout
    from cpbench.sweep import sweep_file

    names: dict[str, Callable[[], Iterable[str]]] = {
        "operators": registry.operators,
        "strategies": registry.strategies,
        "layouts": layout.names,
        "masks": masks.names,
        "inputs": lambda: inputs.KINDS,
        "ropes": lambda: rope.PARAMS,
        "dtypes": lambda: DTYPES,
        "directions": lambda: DIRECTIONS,
        "sweeps": sweep_file.packaged_sweeps,
    }
    return sorted(names[kind]())
