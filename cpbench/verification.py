"""``cpbench verify``: a sweep that checks and does not measure, and its summary."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpbench import registry, sweep
from cpbench.problem import Case
from cpbench.record import FAILURES, Record
from cpbench.runs import Request
from cpbench.settings import MeasureSettings
from cpbench.spec import Spec
from cpbench.store import Run

SEQ_LEN = 293  # prime: nothing divides it
DOCUMENTS = "doc_lens=[1,60,100,7,125]"
MASKS = (
    "full",
    "causal",
    f"full_document:{DOCUMENTS}",
    f"causal_document:{DOCUMENTS}",
    "sliding_window:window=40",
    "sliding_window_causal:window=40",
    "prefix_lm_causal:prefix_len=50",
    f"prefix_lm_document:prefix_len=30,{DOCUMENTS}",
    f"share_question:{DOCUMENTS}",
    f"causal_blockwise:{DOCUMENTS}",
    "global_sliding_window:num_global=9,window=33",
    f"block_causal_document:block_size=32,{DOCUMENTS}",
    "streaming:num_sinks=4,window=37",
)
LONG_SEQ_LEN = 1111
LONG_MASKS = ("causal", "sliding_window_causal:window=200", "causal_document:corpus=prolong64k")
WORLD_SIZES = (2, 3, 4)


def request(
    *,
    operators: str | None,
    strategies: str | None,
    masks: Sequence[str] | None,
    world_sizes: str | None,
    dtypes: str | None,
    device: str,
    launcher: str,
    out: Path | None,
) -> Request:
    """The run that verifies what was asked for, all of it unless told otherwise.

    Raises:
        ValueError: for a name that is not registered, or a value that is not allowed.
    """
    every_operator = sorted(registry.operators())
    chosen = sweep.split_list(operators) if operators else every_operator
    spread = sweep.split_list(strategies) if strategies else sorted(registry.strategies())
    shapes: dict[str, Any] = {
        "mask": [one for text in masks for one in sweep.split_list(text)] if masks else list(MASKS),
        "dtype": sweep.split_list(dtypes) if dtypes else ["float32", "bfloat16"],
        "seq_len": SEQ_LEN,
    }
    sizes = sweep.split_list(world_sizes) if world_sizes else list(WORLD_SIZES)
    tables: list[dict[str, Any]] = []
    if not strategies or "single" in spread:
        for q, kv, dim in ((4, 2, 64), (3, 1, 128)):
            tables.append(
                {
                    **shapes,
                    "operator": chosen,
                    "num_heads_q": q,
                    "num_heads_kv": kv,
                    "head_dim": dim,
                    "direction": ["fwd", "fwd_bwd"],
                }
            )
        # One size that the sampled check sees too.
        longer = {**shapes, "seq_len": LONG_SEQ_LEN, "mask": list(LONG_MASKS)}
        if not masks:
            tables.append({**longer, "operator": chosen, "num_heads_q": 4, "num_heads_kv": 2})
    several = [name for name in spread if Spec.parse(name).name != "single"]
    if several and (strategies or not operators):
        layouts = sorted(
            {
                name
                for text in several
                for name in registry.strategy_info(Spec.parse(text).name).layouts
            }
        )
        # 12 query and 6 key/value heads: 2, 3 and 6 ranks divide both, 4 makes Ulysses refuse,
        # and 12:4 heads on 8 ranks replicate; 1 rank runs every strategy without traffic.
        for heads in ((12, 6), (8, 2)):
            tables.append(
                {
                    **shapes,
                    "operator": chosen if operators else "bands",
                    "strategy": several,
                    "layout": layouts,
                    "num_heads_q": heads[0],
                    "num_heads_kv": heads[1],
                    "head_dim": 64,
                    "world_size": sizes if world_sizes else [1, *sizes],
                }
            )
    cases: dict[str, Case] = {}
    for table in tables:
        for case in sweep.product(table):
            cases.setdefault(case.id, case)
    if not cases:
        raise ValueError("nothing to verify: --strategy names no strategy")
    return Request(
        name="verify",
        cases=list(cases.values()),
        out=out or Path(tempfile.mkdtemp(prefix="cpbench-verify-")),
        launcher=launcher,
        device=device,
        settings=MeasureSettings(time=False, memory=False, timeout_s=300.0),
    )


def summary(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row for each way of computing and dtype: counts, and the largest error per tensor."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        case = record.case
        spread = "" if case.strategy.name == "single" else f"{case.strategy}/{case.layout}"
        groups.setdefault((str(case.operator), spread, case.dtype), []).append(record)
    rows = []
    for (operator, spread, dtype), members in sorted(groups.items()):
        counts = Counter(record.status for record in members)
        worst = {name: _worst(members, name) for name in ("out", "lse", "dq", "dk", "dv")}
        failed = sum(counts[status] for status in (*FAILURES, "oom"))
        ranks = sorted({record.case.world_size for record in members})
        rows.append(
            {
                "operator": operator,
                "strategy/layout": spread,
                "ranks": " ".join(map(str, ranks)),
                "dtype": dtype,
                "ok": counts["ok"],
                "refused": counts["unsupported"],
                "failed": failed,
                **{name: "" if error is None else f"{error:.1e}" for name, error in worst.items()},
                "why": next(
                    (
                        f"{r.status}: {r.reason}"
                        for r in members
                        if r.status not in ("ok", "unsupported")
                    ),
                    next(
                        (
                            r.reason
                            for r in members
                            if r.status == "unsupported" and counts["ok"] == 0
                        ),
                        "",
                    ),
                ),
            }
        )
    return rows


def conclusion(run: Run, asked: Request) -> str:
    """The closing lines, to paste into an issue."""
    counts = Counter(record.status for record in run.records.values())
    lines = [
        f"\n{len(run.records)} of {len(asked.cases)} cases: "
        + ", ".join(f"{n} {status}" for status, n in counts.most_common())
    ]
    for environment in run.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        about = ", ".join(f"{key} {value}" for key, value in packages.items())
        name = device.get("name") or environment.get("processor")
        lines.append(f"{name}: {about}; cpbench {environment.get('commit') or ''}".rstrip())
        break
    lines.append(f"records: {asked.out}")
    return "\n".join(lines)


def _worst(records: Iterable[Record], tensor: str) -> float | None:
    found = [
        errors[tensor]["rel_l2"]
        for record in records
        for errors in record.errors.values()
        if tensor in errors
    ]
    return max((float("inf") if error is None else error for error in found), default=None)
