"""The prediction of one case, as ``cpbench run --predict`` keeps it beside the records.

A line of kind ``prediction`` in a run directory.  It is no record: it never counts as measured,
never competes, and a case that has one is still to be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpbench.core.problem import Case
from cpbench.results.validation import PHASES, checked_values, rule

KIND = "prediction"
STATUS = "predicted"  # of a case that was predicted and not measured
_RULES = {
    "cluster": rule(str),
    "cluster_hash": rule(str),
    "phases": rule(dict[str, dict[str, Any]]),
    "warnings": rule(list[str]),
    "sequence": rule(int),
    "started": rule(float),
    "writer": rule(str),
}
_PHASE_RULES = {name: rule(float) for name in ("seconds", "low", "high", "tflops_per_gpu")}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted time of a case on a cluster.

    Attributes:
        case: the case.
        cluster, cluster_hash: name of the cluster file, and the hash of its content.
        phases: by phase (``fwd``, ``bwd``): ``seconds`` of the slowest rank with an interval from
            ``low`` to ``high``, ``tflops_per_gpu``, and what else ``cpbench predict --json`` says.
        warnings: in how far the case is beyond what the cluster was calibrated on.
        sequence: as that of a :class:`~cpbench.results.record.Record`.
        started: seconds since the epoch.
        writer: name of the file that holds it.
    """

    case: Case
    cluster: str
    cluster_hash: str
    phases: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    sequence: int = 0
    started: float = 0.0
    writer: str = ""

    def milliseconds(self, key: str) -> float:
        """Sum over phases of ``seconds``, ``low`` or ``high``, in ms."""
        return sum(float(phase[key]) for phase in self.phases.values()) * 1e3

    def to_json(self) -> dict[str, Any]:
        """A table of plain values, which :meth:`from_json` reads back."""
        values = {name: getattr(self, name) for name in _RULES if name != "sequence"}
        return {"kind": KIND, "id": self.case.id, "case": self.case.to_json(), **values}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Prediction:
        """Read back :meth:`to_json`.

        Raises:
            ValueError: for a table that is not a prediction; the message says why.
        """
        values = checked_values(table, _RULES)
        try:
            phases = values["phases"]
            if not phases or not PHASES.issuperset(phases):
                raise ValueError(f"phases has {', '.join(sorted(phases)) or 'nothing'}")
            for phase in phases.values():
                checked_values(phase, _PHASE_RULES)
                phase["seconds"], phase["low"], phase["high"]
            case = Case.from_json(table["case"])
            if case.id != table["id"]:
                raise ValueError(f"the id of its case is {case.id}, not {table['id']!r}")
            return cls(case=case, **values)
        except KeyError as error:
            raise ValueError(f"no {error.args[0]}") from None
        except TypeError as error:
            raise ValueError(str(error)) from None
