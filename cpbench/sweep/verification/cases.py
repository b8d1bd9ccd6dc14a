"""``cpbench verify``: a sweep that checks correctness without timing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpbench.core import registry
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.sweep import decoding, sweep_file
from cpbench.sweep.request import Request
from cpbench.sweep.verification import mixers as mixer_tables
from cpbench.sweep.verification import selectors as selector_tables
from cpbench.sweep.verification.mixers import DOCUMENTS, LONG_SEQ_LEN, VALUE_DIMS

SEQ_LEN = 293  # prime: no block size divides it
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


def quick_tables(device: str, devices: int) -> list[dict[str, Any]]:
    """Tables that touch each operator, dtype and family of strategies once or twice: some 150 cases
    for the first minutes on a machine, besides those of libraries that are not installed.

    Args:
        devices: how many ranks can run at once.
    """
    documents, blocks = MASKS[3], HEAD_MASKS[0]
    shapes: dict[str, Any] = {
        "seq_len": SEQ_LEN, "num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64,
        "direction": "fwd_bwd",
    }  # fmt: skip
    names, mixers = mixer_tables.split(sorted(registry.operators()))
    names, paged = decoding.split_paged(names)
    by_head = [name for name in names if "heads" in registry.operators()[name].masks]
    forward_only, mixed_forward = (
        [name for name in of_kind if device not in registry.operators()[name].backward_on]
        for of_kind in (names, mixers)
    )
    strategies = selector_tables.taking_others(registry.strategies_for("attention"))
    unequal = {**shapes, **VALUE_DIMS, "dtype": "bfloat16"}
    on_mixers = {**shapes, **mixer_tables.HEADS, "dtype": "bfloat16", "mask": documents}
    both = {"dtype": ["bfloat16", "float32"], "mask": ["causal", documents]}
    single = [name for name in mixers if "bfloat16" not in registry.operators()[name].dtypes]
    return [
        {**shapes, **both, "operator": names},
        {**shapes, **both, "operator": forward_only, "direction": "fwd"},
        {**shapes, "operator": by_head, "dtype": "bfloat16", "mask": blocks},
        {**shapes, "operator": "dilated", "dtype": "bfloat16", "mask": DILATED_MASKS[0]},
        {**unequal, "operator": _taking_value_dims(names)},
        decoding.verified_tables(paged, both)[0],
        {**on_mixers, "operator": mixers},
        {**on_mixers, "operator": single, "dtype": "float32"},
        {**on_mixers, "operator": mixed_forward, "direction": "fwd"},
        {**unequal, "strategy": ["ring", "ulysses"], "world_size": min(devices, 2)},
        *(
            {**shapes, "strategy": name, "layout": registry.strategies()[name].layouts[0],
             "world_size": min(devices, 2), "dtype": "bfloat16", "mask": ["causal", documents]}
            for name in strategies
        ),
        {**on_mixers, "operator": list(mixer_tables.FEW), "world_size": min(devices, 2),
         "strategy": mixer_tables.distributing()},
        *selector_tables.quick(str(min(devices, 2))),
    ]  # fmt: skip


def build_request(
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
    quick: bool = False,
    rope: str = "none",
    command: Sequence[str] = (),
) -> Request:
    """The run that verifies the given operators and strategies; those not given default to all.

    Args:
        operators, strategies, world_sizes, dtypes: comma-separated lists; None for the default.
        masks: comma-separated lists; none for ``MASKS`` and the masks of single operators.
        out: run directory; None for a temporary one.
        quick: :func:`quick_tables` instead, which takes no lists.
        rope: comma-separated list of rotations of queries and keys.
        command: see :class:`Request`.

    Raises:
        ValueError: for a name that is not registered, or a value that is not allowed.
    """
    settings = MeasureSettings(time=False, memory=False, quality=False, timeout_s=timeout_s)
    named = sweep_file.split_list(operators) if operators else _all_operators()
    attention, mixers = mixer_tables.split(named)
    operator_specs, paged = decoding.split_paged(attention)
    # Strategies that wrap a library are verified only when named.
    own = [name for name, info in registry.strategies_for("attention").items() if info.is_own]
    strategy_specs = sweep_file.split_list(strategies) if strategies else own
    shapes: dict[str, Any] = {
        "mask": [mask for text in masks for mask in sweep_file.split_list(text)]
        if masks
        else list(MASKS),
        "dtype": sweep_file.split_list(dtypes) if dtypes else ["float32", "bfloat16"],
        "seq_len": SEQ_LEN,
        "rope": sweep_file.split_list(rope),
    }
    sizes = sweep_file.split_list(world_sizes) if world_sizes else [str(n) for n in WORLD_SIZES]
    for key, values in {**shapes, "world_size": sizes}.items():
        if key != "mask":  # before masks are built
            sweep_file.parse_values(key, values)
    tables: list[dict[str, Any]] = []
    alone = not strategies or "single" in strategy_specs
    if alone and mixers:
        tables += mixer_tables.tables_alone(mixers, shapes, bool(masks))
    if alone and paged:
        tables += decoding.verified_tables(paged, shapes if masks else {**shapes, "mask": "causal"})
    if alone and operator_specs:
        for num_heads_q, num_heads_kv, head_dim in ((4, 2, 64), (3, 1, 128)):
            tables.append(
                {
                    **shapes,
                    "operator": operator_specs,
                    "num_heads_q": num_heads_q,
                    "num_heads_kv": num_heads_kv,
                    "head_dim": head_dim,
                    "direction": ["fwd", "fwd_bwd"],
                }
            )
        if not masks:
            heads = {"num_heads_q": 4, "num_heads_kv": 2, "operator": operator_specs}
            tables.append({**shapes, **heads, "mask": [*HEAD_MASKS, *DILATED_MASKS]})
            # Long enough for the sampled check to run too.
            tables.append({**shapes, **heads, "seq_len": LONG_SEQ_LEN, "mask": list(LONG_MASKS)})
        if unequal := _taking_value_dims(operator_specs):
            few_masks = {} if masks else {"mask": [*FEW_MASKS, HEAD_MASKS[1]]}
            heads = {"num_heads_q": 4, "num_heads_kv": 2, "operator": unequal}
            tables.append({**shapes, **heads, **VALUE_DIMS, **few_masks})
    if not operators and (not strategies or "single" in strategy_specs):
        strategy_specs = [*strategy_specs, *_variants("single")]
    parallel = [
        spec
        for spec in map(Spec.parse, strategy_specs)
        if spec != Spec("single") and "attention" in registry.strategy_info(spec.name).kinds
    ]
    for spec in _of_mixers(strategy_specs if strategies else mixer_tables.distributing()):
        if not operators or (mixers and strategies):
            few = not operators and not world_sizes
            on_sizes = mixer_tables.FEW_SIZES if few else sizes
            tables += mixer_tables.tables_on_ranks(
                spec, mixers if operators else (), shapes, on_sizes, bool(masks)
            )
    if parallel and (strategies or not operators) and (operator_specs or not mixers):
        selectors = selector_tables.named(operator_specs) if operators else None
        tables += selector_tables.on_ranks(map(str, parallel), world_sizes and sizes, selectors)
        others = [text for text in operator_specs if text not in (selectors or ())]
        base = {**shapes, "operator": others if operators else "bands", "head_dim": 16}
        sizes = sizes if world_sizes else ["1", *sizes]
        parallel = selector_tables.with_others(parallel, others if operators else ["bands"])
        for spec in parallel:
            on_ranks = ["1"] if spec.name == "single" else sizes
            tables += _strategy_tables(spec, base, on_ranks, few_masks=not masks)
    if quick:
        if operators or strategies or masks or world_sizes or dtypes or rope != "none":
            raise ValueError("--quick chooses the cases: leave out the lists")
        tables = quick_tables(device, usable_devices(device))
    cases: dict[str, Case] = {}
    for table in tables:
        for case in sweep_file.expand_table(table):
            cases.setdefault(case.id, case)
    if not cases:
        names = ", ".join(["single", *mixer_tables.distributing()])
        raise ValueError(
            f"nothing to verify: mixers run under {names}, attention under other strategies"
        )
    return Request(
        name="verify",
        cases=list(cases.values()),
        out=out or Path(tempfile.mkdtemp(prefix="cpbench-verify-")),
        launcher=launcher,
        device=device,
        settings=settings,
        command=command,
    )


def usable_devices(device: str) -> int:
    """Number of GPUs by their device files, at least 1; of ranks on CPUs, 2."""
    if device != "cuda":
        return 2
    return max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))


def _of_mixers(strategies: Iterable[str]) -> list[Spec]:
    """Those of the strategies that take sequence mixers on several ranks."""
    specs = map(Spec.parse, strategies)
    known = {spec: registry.strategy_info(spec.name).kinds for spec in specs}
    return [spec for spec, kinds in known.items() if "mixer" in kinds and spec.name != "single"]


def _taking_value_dims(operators: Iterable[str]) -> list[str]:
    """Those of the operators, each with its parameters, that declare ``value_dims``."""
    return [text for text in operators if registry.operator_info(Spec.parse(text).name).value_dims]


def _all_operators() -> list[str]:
    """Every registered operator and its variants."""
    specs = []
    for name, info in sorted(registry.operators().items()):
        specs += [name, *(f"{name}:{variant}" for variant in info.variants)]
    return specs


def _variants(strategy: str) -> list[str]:
    return [f"{strategy}:{text}" for text in registry.strategy_info(strategy).variants]


def _strategy_tables(
    spec: Spec, base: dict[str, Any], sizes: list[str], few_masks: bool
) -> list[dict[str, Any]]:
    """Tables of one strategy on all its layouts, and of its variants and placements on the first
    and the last layout.

    Args:
        spec: with parameters, its variants are left out.
        base: values that all tables share.
        sizes: world sizes.
        few_masks: whether variants and placements are verified on ``FEW_MASKS`` only.
    """
    info = registry.strategy_info(spec.name)
    mask_subset = {"mask": list(FEW_MASKS)} if few_masks else {}
    two_layouts = list(dict.fromkeys([info.layouts[0], info.layouts[-1]]))
    variants = [] if spec.params else _variants(spec.name)
    tables: list[dict[str, Any]] = []
    for num_heads_q, num_heads_kv in STRATEGY_HEADS:
        shared = {**base, "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv}
        tables.append(
            {**shared, "strategy": str(spec), "layout": list(info.layouts), "world_size": sizes}
        )
        if info.value_dims:
            tables.append(
                {
                    **shared,
                    **mask_subset,
                    **VALUE_DIMS,
                    "strategy": str(spec),
                    "layout": two_layouts,
                    "world_size": sizes,
                }
            )
        if variants:
            tables.append(
                {
                    **shared,
                    **mask_subset,
                    "strategy": variants,
                    "layout": two_layouts,
                    "world_size": sizes,
                }
            )
        for size in (int(text) for text in sizes if text.isdigit()):
            if info.axes and size % 2 == 0 and size > 2:  # two nodes, another axis inside them
                tables.append(
                    {
                        **shared,
                        **mask_subset,
                        "placement": list(info.axes[:-1]),
                        "ranks_per_node": size // 2,
                        "strategy": [str(spec), *variants[-1:]],
                        "layout": two_layouts,
                        "world_size": size,
                    }
                )
    return tables
