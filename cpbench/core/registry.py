"""Who is registered: operators, strategies, masks; declarations only, readable without torch.

A kernel file declares ``OPERATORS = (OperatorInfo(...), ...)``, a strategy file ``STRATEGY =
StrategyInfo(...)`` (or a tuple of them).  The files of ``cpbench.kernels``, ``cpbench.selectors``
and ``cpbench.strategies`` are found by looking; other packages register through the entry-point
groups ``cpbench.operators``, ``cpbench.strategies`` and ``cpbench.masks``.
``path/file.py:attribute`` names one that is not registered at all; the file is run by the parent
too, so it imports torch inside functions.  A name registered twice raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

ANY_MASK = ("empty", "full", "causal", "bands")
ANY_LAYOUT = ("contiguous", "zigzag", "zigzag_document", "dispatch", "striped")


@dataclass(frozen=True, kw_only=True)
class OperatorInfo:
    """What an attention operator is and can do, as plain data.

    Attributes:
        name: registered name; a dot separates family and member (``sdpa.flash``).
        summary: one line for people.
        source: paper or library of the method.
        load: ``"module:attribute"`` of a callable that takes the spec's parameters and returns the
            implementation (see ``cpbench.core.operator.Operator``), or that callable itself.
        masks: kinds of ``AttnMask.kind`` it takes.
        dtypes: problem dtypes it takes.
        max_head_dim: largest head_dim.
        devices: device types it runs on at all.
        backward_on: device types on which it has a backward pass.
        external_lse: whether its backward takes the out and lse of a larger computation, which
            strategies that merge partial results need.
        mergeable: whether it has one softmax log-sum-exp, so that partial results merge.
        lse_on: device types on which its forward returns that log-sum-exp.
        deterministic: whether two runs agree to the bit.
        requires: importable modules it needs.
        params: names of the parameters that ``load`` takes.
        interpreted_on: device types on which it runs only under Triton's interpreter.
        compiles: ``"module:attribute"`` of a function that tells what it launches (see
            ``cpbench.tools.aot.launches``), for kernels that compile ahead of time.
        variants: parameters that verification tries beside the defaults, as ``"key=value,…"``.
        selects: whether it chooses, from queries and keys, a part of what the mask lets be seen:
            its result is an approximation of attention (see ``cpbench.selectors.common.base``).
        looks_ahead: where it selects under a causal mask, which later tokens may change a choice:
            none (``""``), those of the query's ``"block"`` or of the whole ``"sequence"``.
        install: how to get what it requires, as a command where there is one.
        unproven: for an adapter that has never run on the library that it calls, the version of the
            library whose source it was written against.
    """

    name: str
    summary: str
    source: str
    load: str | Callable[..., Any]
    masks: tuple[str, ...] = ANY_MASK
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    max_head_dim: int = 256
    devices: tuple[str, ...] = ("cpu", "cuda")
    backward_on: tuple[str, ...] = ("cpu", "cuda")
    external_lse: bool = True
    mergeable: bool = True
    lse_on: tuple[str, ...] = ("cpu", "cuda")
    deterministic: bool = True
    requires: tuple[str, ...] = ("torch",)
    params: tuple[str, ...] = ()
    interpreted_on: tuple[str, ...] = ()
    compiles: str = ""
    variants: tuple[str, ...] = ()
    selects: bool = False
    looks_ahead: str = ""
    install: str = ""
    unproven: str = ""


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """What a context-parallel strategy is, as plain data.

    Attributes:
        name, summary, source, load, params: as for :class:`OperatorInfo`.
        layouts: names of the layouts it takes.
        merges: whether it merges partial results (and so needs a mergeable operator whose backward
            takes an external out and lse).
        axes: of its mesh, outermost first; ``placement`` may put one of them inside a node.
        variants: parameters that verification tries beside the defaults, as ``"key=value,…"``.
        traced: whether all it sends goes through ``Comm``, so that its traffic can be predicted.
        requires: importable modules it needs.
    """

    name: str
    summary: str
    source: str
    load: str | Callable[..., Any]
    layouts: tuple[str, ...] = ANY_LAYOUT
    merges: bool = False
    params: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    traced: bool = True
    requires: tuple[str, ...] = ()


class RegistrationError(ValueError):
    """Two things registered under one name, or an entry point that does not declare one."""


def _modules(package: str) -> Iterator[ModuleType]:
    """The modules of a package and of its sub-packages, but for device code."""
    root = importlib.import_module(package)
    for item in sorted(pkgutil.iter_modules(root.__path__), key=lambda m: m.name):
        name = f"{package}.{item.name}"
        if item.ispkg:
            yield from _modules(name)
        elif not item.name.endswith("_device"):
            yield importlib.import_module(name)


def plugins(group: str) -> Iterator[tuple[str, Any]]:
    """What other packages declare in an entry-point group, each with words for where it is from.

    Raises:
        RegistrationError: when one cannot be imported.
    """
    for point in entry_points(group=group):
        where = f"entry point {point.value}"
        try:
            found = point.load()
        except Exception as error:  # somebody else's code: whatever it raises
            raise RegistrationError(
                f"{where} of {group} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        yield where, found


def _collect(kind: type[T], builtin: Iterable[Any], group: str) -> dict[str, T]:
    found: dict[str, T] = {}
    origin: dict[str, str] = {}
    for where, declared in [*(("cpbench", item) for item in builtin), *plugins(group)]:
        for info in declared if isinstance(declared, tuple | list) else (declared,):
            if not isinstance(info, kind):
                raise RegistrationError(f"{where} of {group} is not a {kind.__name__}: {info!r}")
            name = info.name  # type: ignore[attr-defined]
            if name in found:
                raise RegistrationError(
                    f"{name!r} is registered twice in {group}: by {origin[name]} and by {where}"
                )
            found[name], origin[name] = info, where
    return found


@functools.cache
def operators() -> dict[str, OperatorInfo]:
    """Every registered operator by name."""
    modules = [*_modules("cpbench.kernels"), *_modules("cpbench.selectors")]
    declared = [m.OPERATORS for m in modules if hasattr(m, "OPERATORS")]
    builtin = [one for some in declared for one in some]
    return _collect(OperatorInfo, builtin, "cpbench.operators")


@functools.cache
def strategies() -> dict[str, StrategyInfo]:
    """Every registered strategy by name."""
    declared = [m.STRATEGY for m in _modules("cpbench.strategies") if hasattr(m, "STRATEGY")]
    builtin = [one for some in declared for one in (some if isinstance(some, tuple) else (some,))]
    return _collect(StrategyInfo, builtin, "cpbench.strategies")


def operator_info(name: str) -> OperatorInfo:
    """The declaration of an operator, registered or in a file (``./mine.py:my_op``).

    Raises:
        ValueError: when there is none; the message lists what there is.
    """
    return _lookup(name, operators(), OperatorInfo, "operator")


def strategy_info(name: str) -> StrategyInfo:
    """The declaration of a strategy; as :func:`operator_info`."""
    return _lookup(name, strategies(), StrategyInfo, "strategy")


def missing_package(info: OperatorInfo | StrategyInfo) -> str | None:
    """The first module that ``info`` needs and that is not installed, or None."""
    return next((name for name in info.requires if importlib.util.find_spec(name) is None), None)


def check_params(what: str, name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` for a parameter that ``name`` does not take."""
    allowed = tuple(allowed)
    for key in given:
        if key not in allowed:
            takes = ", ".join(allowed) if allowed else "no parameters"
            raise ValueError(f"{what} {name!r} has no parameter {key!r}; it takes {takes}")


def implementation(info: OperatorInfo | StrategyInfo, params: dict[str, Any]) -> Any:
    """Load what ``info`` declares, with its parameters (a ``ValueError`` names a wrong one)."""
    check_params(
        "operator" if isinstance(info, OperatorInfo) else "strategy", info.name, params, info.params
    )
    target = info.load
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
    wanted = inspect.signature(target).parameters
    for key, value in params.items():
        if key in wanted and wanted[key].annotation in ("int", int) and type(value) is not int:
            raise ValueError(f"{info.name}: {key} = {value!r} is not an integer")
    return target(**params)


def _lookup(name: str, known: dict[str, T], kind: Any, word: str) -> T:
    if ".py:" in name:
        found: T = from_file(name, kind, word)
        return found
    if name not in known:
        raise ValueError(f"no {word} {name!r}; there are: {', '.join(sorted(known))}")
    return known[name]


@functools.cache
def from_file(name: str, kind: Any, word: str) -> Any:
    """What ``path/file.py:attribute`` names, an instance of ``kind``; loaded once.

    Raises:
        ValueError: when there is no such file or attribute, or the file cannot be loaded.
    """
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{word} {name!r}: there is no file {path!r}")
    module_name = "cpbench_user_" + Path(path).stem
    loader = importlib.util.spec_from_file_location(module_name, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[module_name] = module
    try:
        with redirect_stdout(sys.stderr):  # stdout may be somebody's JSON
            loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code: whatever it raises
        raise ValueError(f"{word} {name!r}: {type(error).__name__}: {error}") from error
    info = getattr(module, attribute, None)
    if not isinstance(info, kind):
        there = [key for key, value in vars(module).items() if isinstance(value, kind)]
        raise ValueError(
            f"{word} {name!r}: {attribute!r} is not among the {kind.__name__} objects of {path!r}: "
            f"{', '.join(there) or 'it has none'}"
        )
    return info
