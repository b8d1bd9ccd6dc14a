"""What the Triton operators launch, as data, for compiling ahead of time without a GPU."""

from __future__ import annotations

from typing import Any

from cpbench.core.kernel_launch import Launch
from cpbench.core.problem import DTYPE_BYTES
from cpbench.kernels.triton import configs
from cpbench.kernels.triton.configs import Config, padded_head_dim
from cpbench.kernels.triton.launch import MERGED_ROWS, TERM_ROWS, kernels, precision
from cpbench.kernels.triton.plan import Lists

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_OF_FLOAT32 = ("Lse", "Lse2", "Delta", "Part", "PartLse")
_LISTS = Lists._fields


def launches(
    target: str,
    dtype: str,
    head_dim: int,
    per_head: bool = False,
    split: bool = False,
    **config: int,
) -> list[Launch]:
    """What a forward and a backward pass launch, with four query heads to a key/value head.

    Args:
        per_head: with lists for each head.
        split: with split rows.
        config: fields of a :class:`Config` in place of the table's, for every kernel.
    """
    wanted = {
        name: Config(**{**vars(chosen), **config})
        for name, chosen in configs.choose(target, head_dim, DTYPE_BYTES[dtype], per_head).items()
    }
    if not per_head:  # those that only read and write, alike for both kinds of lists
        forward, dq = wanted["forward"].rows, wanted["backward_dq"].rows
        for name, rows in (("row_terms", TERM_ROWS), ("merge_parts", forward), ("add_parts", dq)):
            wanted[name] = Config(rows, MERGED_ROWS, 4, 1)
    found = []
    for name, used in wanted.items():
        on = next(module for module in kernels() if hasattr(module, name))
        arguments = getattr(on, name).arg_names
        precise = precision(dtype == "float32", target.startswith("cuda"))
        everything: dict[str, Any] = {
            "GROUP": 4, "PER_HEAD": per_head, "LISTED": per_head, "M": used.rows, "N": used.cols,
            "D": padded_head_dim(head_dim), "HEAD_DIM": head_dim, "PRECISION": precise,
            "ROWS": MERGED_ROWS, "DESCRIPTORS": bool(used.descriptors), "STAGES": used.num_stages,
            "SPLIT": split,
        }  # fmt: skip
        constants = {key: value for key, value in everything.items() if key in arguments}
        types = {}
        for argument in arguments:
            if argument in constants:
                continue
            if argument in (*_LISTS, "splits"):
                types[argument] = "*i32"
            elif argument[0].isupper():
                types[argument] = f"*{'fp32' if argument in _OF_FLOAT32 else _TYPES[dtype]}"
            else:
                types[argument] = "fp32" if argument == "scale" else "i32"
        strides = [x for x in types if x[-2:] in ("_b", "_s", "_h")]
        pointers = [x for x, kind in types.items() if kind.startswith("*")]
        found.append(
            Launch(
                name, f"{on.__name__}:{name}", types, constants,
                (*pointers, *strides), used.num_warps, used.num_stages, str(used),
                name in configs.KERNELS,
            )
        )  # fmt: skip
    return found
