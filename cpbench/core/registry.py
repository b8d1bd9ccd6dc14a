"""Registry of operators and strategies: declarations, readable without torch.

A kernel file declares ``OPERATORS = (OperatorInfo(...), ...)``, a strategy file ``STRATEGY =
StrategyInfo(...)`` (or a tuple of them).  All modules of ``cpbench.kernels``, ``cpbench.selectors``
and ``cpbench.strategies`` are searched for them; other packages register through the entry-point
groups ``cpbench.operators``, ``cpbench.strategies`` and ``cpbench.masks``.
``path/file.py:attribute`` names one that is not registered; the file is imported by the parent too,
so it must import torch inside functions only.  A name that is registered twice raises.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cpbench.core.user_files import load_from_file, some_names

if TYPE_CHECKING:
    from cpbench.core.problem import Problem

T = TypeVar("T")

ANY_MASK = ("empty", "full", "causal", "bands")
ANY_LAYOUT = ("contiguous", "zigzag", "zigzag_document", "dispatch", "striped")

_DEEP = "its memory is {what}, whose update is not affine in the state: no scan over tokens exists"
NOT_AFFINE = {
    "atlas": _DEEP.format(what="an MLP trained with Muon"),
    "titans": _DEEP.format(what="an MLP trained by gradient steps"),
    "mela": _DEEP.format(what="an MLP"),
    "lact": _DEEP.format(what="a SwiGLU MLP with normalised weights"),
}
_MODEL = "it {does}, which one layer of attention cannot show"
# Methods that are no operators, with the reason.
REFUSED = NOT_AFFINE | {
    "lazyllm": _MODEL.format(does="drops tokens between layers"),
    "specpc": _MODEL.format(does="drops tokens of the prompt before the first layer"),
    "hmt": _MODEL.format(does="replaces segments by embeddings that a whole model makes"),
}


@dataclass(frozen=True, kw_only=True)
class OperatorInfo:
    """Declaration of an operator and its capabilities, as plain data: of attention, or of a
    sequence mixer, whose results are another thing.

    Attributes:
        name: registered name; a dot separates family and member (``sdpa.flash``).
        summary: one line for people.
        source: paper or library of the method.
        load: ``"module:attribute"`` of a callable that takes the spec's parameters and returns the
            implementation (see ``cpbench.core.operator.Operator``), or that callable itself.
        masks: supported values of ``AttnMask.kind``; of mixers, also ``"causal_document"``.
        dtypes: supported dtypes.
        max_head_dim: largest supported head_dim.
        value_dims: whether values may have another head_dim than queries and keys.
        devices: supported device types.
        backward_on: device types on which it has a backward pass.
        external_lse: whether its backward takes the out and lse of a larger computation, which
            strategies that merge partial results need.
        mergeable: whether it has one softmax log-sum-exp, so that partial results merge.
        lse_on: device types on which its forward returns that log-sum-exp.
        deterministic: whether two runs are bitwise equal.
        rounds_scores: whether it rounds scores to the dtype of q, as a product of bfloat16 matrices
            does; errors may then grow with the scores (see ``cpbench.core.tolerance``).
        lse_error: largest error of its lse in nats, beyond the rounding of scores, for inputs of 16
            bits.
        requires: modules that it imports.
        params: names of the parameters that ``load`` takes.
        interpreted_on: device types on which it runs only under Triton's interpreter.
        compiles: ``"module:attribute"`` of a function that lists its kernel launches (see
            ``cpbench.tools.compiler.aot.launches``), for kernels that compile ahead of time.
        variants: parameters to verify beside the defaults, as ``"key=value,…"``.
        selects: whether it is a selector: it computes attention over a subset of the visible pairs
            that it selects from queries and keys (see ``cpbench.selectors.common.base``).
        looks_ahead: of a selector under a causal mask: which later tokens may change its selection,
            none (``""``), those of the query's ``"block"`` or of the whole ``"sequence"``.
        selects_from: of a selector: what its selection for a block of queries depends on besides
            those queries: all ``"keys"``; ``"pooled_keys"``, a few vectors for each block of keys;
            or the whole ``"sequence"``, other queries too, so that it cannot run on some of them.
        selects_for: of a selector: the heads that it selects for together: each ``"head"`` alone,
            the ``"group"`` of query heads of a key/value head, or ``"all"``.
        selects_by_values: of a selector: whether its selection depends on the values too.
        rotates: of a selector: whether it applies RoPE itself, so that its inputs have none.
        paged: whether it decodes over a table of pages (``Problem.page_size``), and nothing else.
        mixer: of a sequence mixer: the recurrence that it computes (a name in
            ``cpbench.kernels.mixers.forms``), against which it is checked; "" for attention.
        gates: of a mixer: its inputs beside q, k and v, each with what has a number of its own: a
            ``"head"`` ``[B, S, H]``, or a ``"key"`` dimension ``[B, S, H, K]``.
        initial_states: of a mixer: whether it takes a state to start from.
        rounds_states: of a mixer: whether it rounds what it adds to a state to the dtype of its
            inputs; the limit of the error of the state is then that of the other results.
        install: how to install what it requires, as a command if there is one.
        workspace: bytes of device memory that a call takes beside its inputs and results, for the
            problem of the call, whose direction is that of its phase; None: none.
        unproven: of an adapter that has never run on the library that it calls: the version of the
            library whose source it was written against.
    """

    name: str
    summary: str
    source: str
    load: str | Callable[..., Any]
    masks: tuple[str, ...] = ANY_MASK
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    max_head_dim: int = 256
    value_dims: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    backward_on: tuple[str, ...] = ("cpu", "cuda")
    external_lse: bool = True
    mergeable: bool = True
    lse_on: tuple[str, ...] = ("cpu", "cuda")
    deterministic: bool = True
    rounds_scores: bool = False
    lse_error: float = 1e-5
    requires: tuple[str, ...] = ("torch",)
    params: tuple[str, ...] = ()
    interpreted_on: tuple[str, ...] = ()
    compiles: str = ""
    variants: tuple[str, ...] = ()
    selects: bool = False
    looks_ahead: str = ""
    selects_from: Literal["keys", "pooled_keys", "sequence"] = "sequence"
    selects_for: Literal["head", "group", "all"] = "all"
    selects_by_values: bool = False
    rotates: bool = False
    paged: bool = False
    mixer: str = ""
    gates: tuple[tuple[str, Literal["head", "key"]], ...] = ()
    initial_states: bool = False
    rounds_states: bool = False
    install: str = ""
    workspace: Callable[[Problem], int] | None = None
    unproven: str = ""

    @property
    def kind(self) -> str:
        """What it computes: ``"attention"`` or ``"mixer"``."""
        return "mixer" if self.mixer else "attention"

    def gate_lanes(self, head_dim: int) -> tuple[tuple[str, int], ...]:
        """The ``gates`` of a problem with keys of this head_dim."""
        return tuple((name, head_dim if each == "key" else 0) for name, each in self.gates)


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """Declaration of a context-parallel strategy, as plain data.

    Attributes:
        name, summary, source, load, params: as for :class:`OperatorInfo`.
        layouts: names of the supported layouts.
        kinds: kinds of operators that it takes: ``"attention"``, ``"mixer"``.
        selectors: the selectors that it takes: ``"none"``; ``"any"``, if every call of the operator
            is given all keys; ``"pooled"``, those that select from pooled keys, and no operators of
            another kind.
        mixers: as ``load``: the implementation for sequence mixers, if it is another one, which may
            take fewer parameters; "" if not.
        decodes: as ``load``: the implementation for batches that are decoded with a cache that is
            divided by heads (``World.held_heads``); "" if by tokens.
        value_dims: as for :class:`OperatorInfo`.
        merges: whether it merges partial results (and so needs a mergeable operator whose backward
            takes an external out and lse).
        axes: names of the axes of its mesh, outermost first; ``placement`` may put one of them
            inside a node.
        variants: parameters to verify beside the defaults, as ``"key=value,…"``; mixer_variants:
            those of sequence mixers.
        traced: whether all its communication goes through ``Comm``, so that it can be predicted.
        requires: modules that it imports.
        offloaded: as ``load``, for the parameter ``offload=host``: an implementation whose tensors
            are in host memory, which takes other parameters and merges partial results; "" if there
            is none.
    """

    name: str
    summary: str
    source: str
    load: str | Callable[..., Any]
    layouts: tuple[str, ...] = ANY_LAYOUT
    kinds: tuple[str, ...] = ("attention",)
    selectors: Literal["none", "any", "pooled"] = "none"
    mixers: str | Callable[..., Any] = ""
    decodes: str | Callable[..., Any] = ""
    value_dims: bool = False
    merges: bool = False
    params: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    mixer_variants: tuple[str, ...] = ()
    traced: bool = True
    requires: tuple[str, ...] = ()
    offloaded: str | Callable[..., Any] = ""

    @property
    def is_own(self) -> bool:
        """Whether it does not send through a library."""
        return self.traced or self.selectors == "pooled"

    def is_offloaded(self, params: Mapping[str, Any]) -> bool:
        """Whether these parameters name the implementation ``offloaded``.

        Raises:
            ValueError: for a value of ``offload`` that is not allowed.
        """
        if not self.offloaded or "offload" not in params:
            return False
        if params["offload"] != "host":
            raise ValueError(f"{self.name}: offload = {params['offload']!r} is not host")
        return True


class LoadError(Exception):
    """An implementation that cannot be loaded, or lacks methods; the message is one line."""


class Refused(ValueError):
    """A known method that is not an operator; the message says why, in one line."""


class RegistrationError(ValueError):
    """A name that is registered twice, or an entry point that is not a declaration."""


def _modules(package: str) -> Iterator[ModuleType]:
    """Import the modules of a package and its sub-packages, except device code (``*_device``)."""
    root = importlib.import_module(package)
    for module_info in sorted(pkgutil.iter_modules(root.__path__), key=lambda info: info.name):
        name = f"{package}.{module_info.name}"
        if module_info.ispkg:
            yield from _modules(name)
        elif not module_info.name.endswith("_device"):
            yield importlib.import_module(name)


def plugins(group: str) -> Iterator[tuple[str, Any]]:
    """Objects that other packages declare in an entry-point group, each with its origin in words.

    Raises:
        RegistrationError: when an entry point cannot be imported.
    """
    for point in entry_points(group=group):
        origin = f"entry point {point.value}"
        try:
            declared = point.load()
        except Exception as error:  # code of another package may raise anything
            raise RegistrationError(
                f"{origin} of {group} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        yield origin, declared


def _collect(kind: type[T], builtin: Iterable[Any], group: str) -> dict[str, T]:
    """Declarations by name: the built-in ones and those of an entry-point group."""
    infos: dict[str, T] = {}
    origins: dict[str, str] = {}
    for origin, declared in [*(("cpbench", info) for info in builtin), *plugins(group)]:
        for info in declared if isinstance(declared, tuple | list) else (declared,):
            if not isinstance(info, kind):
                raise RegistrationError(f"{origin} of {group} is not a {kind.__name__}: {info!r}")
            name = info.name  # type: ignore[attr-defined]
            if name in infos:
                raise RegistrationError(
                    f"{name!r} is registered twice in {group}: by {origins[name]} and by {origin}"
                )
            infos[name], origins[name] = info, origin
    return infos


@functools.cache
def operators() -> dict[str, OperatorInfo]:
    """Every registered operator by name."""
    modules = [*_modules("cpbench.kernels"), *_modules("cpbench.selectors")]
    declared: list[Any] = [module.OPERATORS for module in modules if hasattr(module, "OPERATORS")]
    return _collect(OperatorInfo, declared, "cpbench.operators")


@functools.cache
def strategies() -> dict[str, StrategyInfo]:
    """Every registered strategy by name."""
    modules = _modules("cpbench.strategies")
    declared = [module.STRATEGY for module in modules if hasattr(module, "STRATEGY")]
    return _collect(StrategyInfo, declared, "cpbench.strategies")


def strategies_for(kind: str) -> dict[str, StrategyInfo]:
    """The registered strategies, sorted by name, that take operators of a kind."""
    return {name: info for name, info in sorted(strategies().items()) if kind in info.kinds}


def operator_info(name: str) -> OperatorInfo:
    """The declaration of an operator, registered or in a file (``./mine.py:my_op``).

    Raises:
        Refused: for a method that cannot be one.
        ValueError: when there is none of that name; the message lists the names.
    """
    if reason := REFUSED.get(name.lower()):
        raise Refused(f"{name} is not an operator: {reason}")
    return _lookup(name, operators(), OperatorInfo, "operator")


def strategy_info(name: str) -> StrategyInfo:
    """The declaration of a strategy, like :func:`operator_info`."""
    return _lookup(name, strategies(), StrategyInfo, "strategy")


def missing_package(info: OperatorInfo | StrategyInfo) -> str | None:
    """The first required module that is not installed, or None."""
    return next((name for name in info.requires if importlib.util.find_spec(name) is None), None)


def check_params(what: str, name: str, params: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` for a parameter that ``name`` does not take.

    Args:
        what: kind of thing that ``name`` names (``"operator"``), for the message.
    """
    allowed = tuple(allowed)
    for param in params:
        if param not in allowed:
            takes = ", ".join(allowed) if allowed else "no parameters"
            raise ValueError(f"{what} {name!r} has no parameter {param!r}; it takes {takes}")


def implementation(
    info: OperatorInfo | StrategyInfo, params: dict[str, Any], kind: str = "attention"
) -> Any:
    """Load the implementation that ``info`` declares, with its parameters.

    Args:
        kind: of the operators that a strategy is for, or ``"decode"``.

    Raises:
        ValueError: for a parameter that it does not take, or a value that it refuses.
        LoadError: when there is no such implementation, or it lacks a method of the contract.
    """
    check_params(
        "operator" if isinstance(info, OperatorInfo) else "strategy", info.name, params, info.params
    )
    place, where = info.load, "without offload=host"
    if isinstance(info, StrategyInfo):
        if info.is_offloaded(params):
            place, where = info.offloaded, "with offload=host"
            params = {k: x for k, x in params.items() if k != "offload"}
        elif kind == "mixer" and info.mixers:
            place, where = info.mixers, "for sequence mixers"
        elif kind == "decode" and info.decodes:
            place, where = info.decodes, "for decoding"
    target = place
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # the module may raise anything
            reason = " ".join(str(error).split())
            raise LoadError(f"{info.name}: cannot load {place}: {reason}") from error
    signature = inspect.signature(target).parameters
    if isinstance(info, StrategyInfo) and (info.offloaded or info.mixers):
        for name in params:
            if name not in signature:
                raise ValueError(f"{info.name} takes no {name} {where}")
    for name, value in params.items():
        annotation = signature[name].annotation if name in signature else None
        for kind_of, what in ((int, "an integer"), (bool, "true or false")):
            if annotation in (kind_of.__name__, kind_of) and type(value) is not kind_of:
                raise ValueError(f"{info.name}: {name} = {value!r} is not {what}")
    try:
        made = target(**params)
    except (ValueError, TypeError):  # refused
        raise
    except Exception as error:
        raise LoadError(f"{info.name}: cannot be made: {type(error).__name__}: {error}") from error
    lacking = [name for name in _contract(info) if not callable(getattr(made, name, None))]
    if lacking:
        raise LoadError(f"{info.name}: {type(made).__name__} has no {', '.join(lacking)}")
    return made


def _contract(info: OperatorInfo | StrategyInfo) -> tuple[str, ...]:
    """Methods that an implementation has."""
    if isinstance(info, StrategyInfo):
        return ("unsupported", "prepare", "forward", "backward")
    return () if info.selects else ("unsupported", "prepare", "forward")


def _lookup(name: str, registered: dict[str, T], kind: Any, what: str) -> T:
    if ".py:" in name:
        info: T = load_from_file(name, kind, what)
        return info
    if name not in registered:
        raise ValueError(f"no {what} {name!r}; there are: {some_names(name, registered)}")
    return registered[name]
