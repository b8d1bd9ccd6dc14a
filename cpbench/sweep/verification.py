"""``cpbench verify``: a sweep that checks and does not measure, and its summary."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpbench.core import registry
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.results.record import FAILURES, Record
from cpbench.results.store import Run
from cpbench.sweep import sweep_file
from cpbench.sweep.runs import Request

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
HEAD_MASKS = (
    "block_sparse_uniform:block_size=16,keep=0.3",
    "block_sparse_uniform:block_size=32,keep=0.3,causal=true",
    "block_sparse_variable:block_size=32,least=5,keep=0.3",
    "vertical_slash:num_vertical=5,num_slash=4",
)
DILATED_MASKS = (
    "dilated:segment=32,branches=3,ratio=2",
    "dilated:segment=50,branches=2,ratio=3,causal=false",
)
LONG_SEQ_LEN = 1111
LONG_MASKS = (
    "causal",
    "sliding_window_causal:window=200",
    "causal_document:corpus=prolong64k",
    "block_sparse_uniform:block_size=64,keep=0.2",
)
FEW_MASKS = ("full", "causal", f"causal_document:{DOCUMENTS}", f"share_question:{DOCUMENTS}")
WORLD_SIZES = (2, 3, 4)
# 2, 3 and 6 ranks divide 6 key/value heads; 2 are replicated on 4, 6 and 8.
STRATEGY_HEADS = ((24, 6), (24, 2))


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
    timeout_s: float,
) -> Request:
    """The run that verifies what was asked for, all of it unless told otherwise.

    Raises:
        ValueError: for a name that is not registered, or a value that is not allowed.
    """
    settings = MeasureSettings(time=False, memory=False, quality=False, timeout_s=timeout_s)
    chosen = sweep_file.split_list(operators) if operators else _all_operators()
    ours = sorted(name for name, info in registry.strategies().items() if info.traced)
    spread = sweep_file.split_list(strategies) if strategies else ours  # libraries when named
    shapes: dict[str, Any] = {
        "mask": [one for text in masks for one in sweep_file.split_list(text)]
        if masks
        else list(MASKS),
        "dtype": sweep_file.split_list(dtypes) if dtypes else ["float32", "bfloat16"],
        "seq_len": SEQ_LEN,
    }
    sizes = sweep_file.split_list(world_sizes) if world_sizes else [str(n) for n in WORLD_SIZES]
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
        if not masks:
            each = {"num_heads_q": 4, "num_heads_kv": 2, "operator": chosen}
            tables.append({**shapes, **each, "mask": [*HEAD_MASKS, *DILATED_MASKS]})
        # One size that the sampled check sees too.
        longer = {**shapes, "seq_len": LONG_SEQ_LEN, "mask": list(LONG_MASKS)}
        if not masks:
            tables.append({**longer, "operator": chosen, "num_heads_q": 4, "num_heads_kv": 2})
    several = [Spec.parse(text) for text in spread if Spec.parse(text).name != "single"]
    if several and (strategies or not operators):
        base = {**shapes, "operator": chosen if operators else "bands", "head_dim": 16}
        sizes = sizes if world_sizes else ["1", *sizes]
        for spec in several:
            tables += _spread(spec, base, sizes, some=not masks)
    cases: dict[str, Case] = {}
    for table in tables:
        for case in sweep_file.product(table):
            cases.setdefault(case.id, case)
    if not cases:
        raise ValueError("nothing to verify: --strategy names no strategy")
    return Request(
        name="verify",
        cases=list(cases.values()),
        out=out or Path(tempfile.mkdtemp(prefix="cpbench-verify-")),
        launcher=launcher,
        device=device,
        settings=settings,
    )


def _all_operators() -> list[str]:
    """Every registered operator, and its variants."""
    found = []
    for name, info in sorted(registry.operators().items()):
        found += [name, *(f"{name}:{text}" for text in info.variants)]
    return found


def _spread(spec: Spec, base: dict[str, Any], sizes: list[str], some: bool) -> list[dict[str, Any]]:
    """Tables of one strategy: on all its layouts; its variants and placements (of a spec without
    parameters) on the first and last layout, and with a few of the masks if ``some``."""
    info = registry.strategy_info(spec.name)
    few = {"mask": list(FEW_MASKS)} if some else {}
    ends = list(dict.fromkeys([info.layouts[0], info.layouts[-1]]))
    variants = [] if spec.params else [f"{spec.name}:{text}" for text in info.variants]
    tables: list[dict[str, Any]] = []
    for heads in STRATEGY_HEADS:
        shared = {**base, "num_heads_q": heads[0], "num_heads_kv": heads[1]}
        tables.append(
            {**shared, "strategy": str(spec), "layout": list(info.layouts), "world_size": sizes}
        )
        if variants:
            tables.append(
                {**shared, **few, "strategy": variants, "layout": ends, "world_size": sizes}
            )
        for size in (int(n) for n in sizes if n.isdigit()):
            if info.axes and size % 2 == 0 and size > 2:  # two nodes, another axis inside them
                placed = {"placement": list(info.axes[:-1]), "ranks_per_node": size // 2}
                names = [str(spec), *variants[-1:]]
                tables.append(
                    {
                        **shared,
                        **few,
                        **placed,
                        "strategy": names,
                        "layout": ends,
                        "world_size": size,
                    }
                )
    return tables


def summary(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row for each way of computing and dtype: counts, and the largest error per tensor."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        case = record.case
        spread = "" if case.strategy.name == "single" else f"{case.strategy}/{case.layout}"
        spread += f" {case.placement} inside" if case.placement else ""
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
