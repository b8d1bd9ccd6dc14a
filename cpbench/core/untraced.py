"""Functions that ``torch.compile`` runs instead of tracing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as it is, also where ``torch.compile`` traces its caller: numpy's arrays would
    become tensors.

    As ``torch.compiler.disable``, without importing the compiler, which takes a second.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" in sys.modules:
            return _disabled(function)(*args, **kwargs)
        return function(*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run


_DISABLED: dict[Any, Any] = {}  # not functools.cache, of which the compiler warns


def _disabled(function: Callable[P, R]) -> Callable[P, R]:
    import torch

    if function not in _DISABLED:
        _DISABLED[function] = torch.compiler.disable(function)
    disabled: Callable[P, R] = _DISABLED[function]
    return disabled
