"""Kernel launches of the Triton operators as data, to compile them ahead of time without a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from cpbench.core.kernel_launch import Launch
from cpbench.core.problem import DTYPE_BYTES
from cpbench.kernels.triton import configs
from cpbench.kernels.triton.configs import Config, head_constants, head_parts
from cpbench.kernels.triton.launch import MERGE_ROWS, ROW_TERMS_ROWS, device_modules, precision
from cpbench.kernels.triton.plan import TileLists
from cpbench.parallel.partial_results.merge import ROWS as MERGED_ROWS
from cpbench.parallel.partial_results.merge import triton_size

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FLOAT32_ARGUMENTS = ("Lse", "Lse2", "Delta", "Partial", "PartialLse")
_LIST_NAMES = TileLists._fields
# What each kernel loads in its loop, through descriptors if so configured.
REST = "Rest"  # after the name of a tensor: its second part
_STREAMED = {"forward": ("K", "V"), "backward_dq": ("K", "V"), "backward_dkv": ("Q", "DOut")}


def launches(
    target: str,
    dtype: str,
    head_dim: int,
    per_head: bool = False,
    split: bool = False,
    head_dim_v: int = 0,
    **config: int,
) -> list[Launch]:
    """The launches of a forward and a backward pass, with four query heads per key/value head.

    Args:
        per_head: with lists per head.
        split: with split rows.
        head_dim_v: of values; 0 for ``head_dim``.
        config: fields of a :class:`Config` that override the table, for every kernel.
    """
    value_dim = head_dim_v or head_dim
    widest = max(head_dim, value_dim)
    defaults = configs.kernel_configs(target, widest, DTYPE_BYTES[dtype], per_head)
    kernel_configs = {name: Config(**{**vars(c), **config}) for name, c in defaults.items()}
    if not per_head:  # kernels without matrix products are the same for both kinds of lists
        kernel_configs |= {
            name: Config(rows, MERGE_ROWS, 4, 1)
            for name, rows in (
                ("row_terms", ROW_TERMS_ROWS),
                ("merge_partials", kernel_configs["forward"].rows),
                ("sum_partials", kernel_configs["backward_dq"].rows),
            )
        }
    launches = []
    for (name, label, wanted), used in _launched(kernel_configs):
        module = next(module for module in device_modules() if hasattr(module, name))
        arguments = getattr(module, name).arg_names
        input_precision = precision(dtype == "float32", target.startswith("cuda"))
        all_constants: dict[str, Any] = {
            "GROUP": 4, "PER_HEAD": per_head, "LISTED": per_head, "M": used.rows, "N": used.cols,
            **head_constants(head_dim, value_dim), "PRECISION": input_precision,
            "ROWS": MERGE_ROWS, "DESCRIPTORS": bool(used.descriptors), "STAGES": used.num_stages,
            "SPLIT": split, "WANTED": wanted,
        }  # fmt: skip
        constants = {key: value for key, value in all_constants.items() if key in arguments}
        streamed = _STREAMED.get(name, ())
        constants |= {f"{x}{REST}": None for x in streamed}
        types = {}
        if used.descriptors:
            for x in streamed:
                parts = head_parts(value_dim if x in ("V", "DOut") else head_dim)
                for argument, part in zip((x, f"{x}{REST}"), parts, strict=True):
                    if part:
                        tile = f"{_TYPES[dtype]}[1, {used.cols}, 1, {part}]"
                        types[argument] = f"tensordesc<{tile}>"
                        constants.pop(argument, None)
        for argument in arguments:
            if argument in constants or argument in types:
                continue
            if argument in (*_LIST_NAMES, "splits"):
                types[argument] = "*i32"
            elif argument[0].isupper():
                is_float32 = argument in _FLOAT32_ARGUMENTS
                types[argument] = f"*{'fp32' if is_float32 else _TYPES[dtype]}"
            else:
                types[argument] = "fp32" if argument == "scale" else "i32"
        strides = [argument for argument in types if argument[-2:] in ("_b", "_s", "_h")]
        pointers = [argument for argument, type_ in types.items() if type_[0] == "*"]
        launches.append(
            Launch(
                label, f"{module.__name__}:{name}", types, constants,
                (*pointers, *strides), used.num_warps, used.num_stages, str(used),
                name in configs.KERNELS,
            )
        )  # fmt: skip
    if not per_head:
        launches.append(_merge_launch(dtype, value_dim))
    return launches


def _merge_launch(dtype: str, head_dim: int) -> Launch:
    """The launch that merges a partial result into one of float32, as in a step of a ring."""
    constants = {"ROWS": MERGED_ROWS, "D": triton_size(head_dim), "HEAD_DIM": head_dim}
    module = "cpbench.parallel.partial_results.merge_device"
    arguments = importlib.import_module(module).merge_results.arg_names
    types = {name: "*fp32" if name[0].isupper() else "i32" for name in arguments}
    types |= {"Partial": f"*{_TYPES[dtype]}"}
    types = {name: type_ for name, type_ in types.items() if name not in constants}
    aligned = tuple(name for name in types if name[0].isupper() or name[-2:] in ("_b", "_s", "_h"))
    return Launch(
        "merge_results", f"{module}:merge_results", types, constants, aligned, 4, 1,
        f"{MERGED_ROWS} rows", multiplies=False,
    )  # fmt: skip


def _launched(kernels: dict[str, Config]) -> Iterator[tuple[tuple[str, str, int], Config]]:
    """Each launch: the kernel, its name in tables, what it is to compute, and its configuration."""
    device = device_modules()[1]
    for name, config in kernels.items():
        if config.launches == 2 and name == "backward_dkv":
            yield (name, f"{name}.dk", device.ONLY_DK.value), config
            yield (name, f"{name}.dv", device.ONLY_DV.value), config
        else:
            yield (name, name, device.BOTH.value), config
