"""The state of the process that operators share: threads, precisions, modes, environment, ….

A case that changes it would change the measurement of itself or of those after it.  The state is
read before an operator is loaded, compared after each case and put back.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

ABSENT = "absent"  # value of a name that a table does not have
# A new variable matters where libraries that operators share read it; a cache directory does not.
SHARED_VARIABLES = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH", "PYTORCH_",
    "TRITON_", "CUDA_", "CUBLAS", "CUDNN_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "MALLOC_",
)  # fmt: skip
# Their functions are what every operator computes, communicates or is timed with.
NAMESPACES = ("torch", "torch.Tensor", "torch.nn.functional", "torch.distributed", "time")
REPLACED_BY_TORCH = ("manual_seed", "Storage")  # by torch.compile and with the default dtype
COMPILER_SETTINGS = ("torch._dynamo.config", "torch._inductor.config")


class Setting(NamedTuple):
    """A part of the state: a value, or a table of which single names may change.

    Attributes:
        quiet: put back without being reported: drawing random numbers is no fault.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    quiet: bool = False


class ProcessState:
    """The state at the time of construction."""

    def __init__(self) -> None:
        self._settings = [*_torch_settings(), *_process_settings(), *_random_states()]
        self._values = [setting.read() for setting in self._settings]

    def changes(self) -> list[str]:
        """What differs now, in words: ``threads 1 -> 2``, ``environment OMP_NUM_THREADS``."""
        return [text for setting, before in self._pairs() for text in _differences(setting, before)]

    def restore(self) -> list[str]:
        """Put everything back; returns :meth:`changes`."""
        changes: list[str] = []
        for setting, before in self._pairs():  # modes are the first: the rest may compute
            changes += _differences(setting, before)
            if setting.read() != before:
                setting.write(before)
        return changes

    def _pairs(self) -> Iterator[tuple[Setting, Any]]:
        return zip(self._settings, self._values, strict=True)


def _differences(setting: Setting, before: Any) -> Iterator[str]:
    if setting.quiet or (after := setting.read()) == before:
        return
    if not isinstance(before, dict):
        yield f"{setting.name} {before} -> {after}"
        return
    for name in sorted(before.keys() | after.keys(), key=str):
        if before.get(name, ABSENT) != after.get(name, ABSENT):
            yield f"{setting.name} {name if isinstance(name, str) else '.'.join(name)}"


def _process_settings() -> list[Setting]:
    return [
        _environment(),
        Setting("working directory", os.getcwd, os.chdir),
        Setting("affinity", lambda: os.sched_getaffinity(0), lambda x: os.sched_setaffinity(0, x)),
        Setting(
            "priority",
            lambda: os.getpriority(os.PRIO_PROCESS, 0),
            lambda x: os.setpriority(os.PRIO_PROCESS, 0, x),
        ),
        Setting("signal handler", _signal_handlers, _set_signal_handlers),
        Setting("gc", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        Setting("gc threshold", gc.get_threshold, lambda x: gc.set_threshold(*x)),
        Setting("switch interval", sys.getswitchinterval, sys.setswitchinterval),
        Setting("trace function", sys.gettrace, sys.settrace),
        Setting("profile function", sys.getprofile, sys.setprofile),
        _functions(),
    ]


def _torch_settings() -> list[Setting]:
    import torch

    backends: Any = torch.backends  # its modules compute their attributes
    c: Any = torch._C
    settings = [
        # Modes first, since what follows must not be computed under them.
        Setting("default device", _default_device, torch.set_default_device),
        Setting("function modes", c._len_torch_function_stack, _pop_function_modes),
        Setting("dispatch modes", c._len_torch_dispatch_stack, _pop_dispatch_modes),
        Setting("threads", torch.get_num_threads, torch.set_num_threads),
        Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Setting("inference mode", torch.is_inference_mode_enabled, _enter_inference_mode),
        Setting("anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Setting(
            "deterministic",
            torch.get_deterministic_debug_mode,
            torch.set_deterministic_debug_mode,
        ),
        Setting("flush denormals", _flushes_denormals, torch.set_flush_denormal),
        Setting(
            "matmul precision",
            _matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        Setting("SDPA order", c._get_sdp_priority_order, c._set_sdp_priority_order),
        Setting(
            "autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
        ),
        _compiler_settings(),
        Setting("CUDA device", _cuda_device, _set_cuda_device),
        Setting("CUDA stream", _cuda_stream, _set_cuda_stream),
        Setting("torch seed", torch.initial_seed, lambda _: None),  # with the random state
    ]
    for device in ("cpu", "cuda"):
        settings += [
            Setting(
                f"{device} autocast",
                functools.partial(torch.is_autocast_enabled, device),
                functools.partial(torch.set_autocast_enabled, device),
            ),
            Setting(
                f"{device} autocast dtype",
                functools.partial(torch.get_autocast_dtype, device),
                functools.partial(torch.set_autocast_dtype, device),
            ),
        ]
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        enabled = getattr(backends.cuda, f"{name}_sdp_enabled")
        settings.append(
            Setting(f"SDPA {name}", enabled, getattr(backends.cuda, f"enable_{name}_sdp"))
        )
    # After the matmul precision, which sets some of them.
    for backend, operation in (
        ("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"),
        ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"),
    ):  # fmt: skip
        settings.append(
            Setting(
                f"fp32 precision of {backend} {operation}",
                functools.partial(c._get_fp32_precision_getter, backend, operation),
                functools.partial(c._set_fp32_precision_setter, backend, operation),
            )
        )
    for owner, label, names in (
        (backends.cudnn, "cudnn", ("enabled", "benchmark", "deterministic")),
        (backends.mkldnn, "mkldnn", ("enabled", "deterministic")),
        (backends.cuda.matmul, "cuda matmul", ("allow_fp16_accumulation",)),
        (torch.utils.deterministic, "deterministic", ("fill_uninitialized_memory",)),
    ):
        settings += [
            Setting(
                f"{label} {name}",
                functools.partial(getattr, owner, name),
                functools.partial(setattr, owner, name),
            )
            for name in names
        ]
    for dtype in ("fp16", "bf16"):
        name = f"cublas_allow_{dtype}_reduced_precision_reduction"
        settings.append(
            Setting(
                f"{dtype} reduced precision reduction",
                getattr(c, f"_get_{name}"),
                functools.partial(_set_reduction, getattr(c, f"_set_{name}")),
            )
        )
    return settings


def _random_states() -> list[Setting]:
    import numpy as np
    import torch

    def numpy_state() -> Any:
        kind, keys, *rest = np.random.get_state(legacy=True)
        return (kind, np.asarray(keys).tobytes(), *rest)

    def set_numpy_state(state: Any) -> None:
        kind, keys, *rest = state
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))

    def torch_state() -> Any:
        states = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state())
        return [state.numpy().tobytes() for state in states]

    def set_torch_state(states: Any) -> None:
        tensors = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
        torch.set_rng_state(tensors[0])
        for state in tensors[1:]:
            torch.cuda.set_rng_state(state)

    return [
        Setting("random", random.getstate, random.setstate, quiet=True),
        Setting("numpy random", numpy_state, set_numpy_state, quiet=True),
        Setting("torch random", torch_state, set_torch_state, quiet=True),
    ]


# --- what has no pair of functions --------------------------------------------------------------


def _environment() -> Setting:
    # With an underscore, they are libraries' own notes.
    inherited = frozenset(name for name in os.environ if not name.startswith("_"))

    def read() -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if name in inherited
            or (name.startswith(SHARED_VARIABLES) and not name.endswith("_CACHE_DIR"))
        }

    def write(before: dict[str, str]) -> None:
        for name in read().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

    return Setting("environment", read, write)


def _signal_handlers() -> dict[str, Any]:
    return {number.name: signal.getsignal(number) for number in signal.Signals}


def _set_signal_handlers(before: dict[str, Any]) -> None:
    for name, handler in before.items():
        number = signal.Signals[name]
        if signal.getsignal(number) != handler and handler is not None:  # None: not Python's
            signal.signal(number, handler)


def _functions() -> Setting:
    """The public functions of ``NAMESPACES``: libraries replace some by their own."""
    owners = [_named(namespace) for namespace in NAMESPACES]
    names = [
        (namespace, owner, name)
        for namespace, owner in zip(NAMESPACES, owners, strict=True)
        for name in dir(owner)
        if callable(getattr(owner, name))
        and not name.startswith("_")
        and name not in REPLACED_BY_TORCH
    ]

    def read() -> dict[str, Any]:
        return {f"{text}.{name}": getattr(owner, name, None) for text, owner, name in names}

    def write(before: dict[str, Any]) -> None:
        for text, owner, name in names:
            if getattr(owner, name, None) != before[f"{text}.{name}"]:
                setattr(owner, name, before[f"{text}.{name}"])

    return Setting("replaced", read, write)


def _named(dotted: str) -> Any:
    """The module or class of that name; its package has been imported."""
    top, *rest = dotted.split(".")
    return functools.reduce(getattr, rest, sys.modules[top])


def _compiler_settings() -> Setting:
    """Settings of torch.compile that differ from their defaults; none before it is imported."""

    def read() -> dict[tuple[str, str], Any]:
        changed = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that are deprecated
            for module in (sys.modules[name] for name in COMPILER_SETTINGS if name in sys.modules):
                for name, entry in vars(module)["_config"].items():
                    if name.endswith("_limit"):  # of recompilations: changes no compiled code
                        continue
                    value, default = getattr(module, name), entry.default
                    if type(value) is type(default) in (bool, int, float, str) and value != default:
                        changed[module.__name__, name] = value
        return changed

    def write(before: dict[tuple[str, str], Any]) -> None:
        for module, name in read().keys() - before.keys():
            default = vars(sys.modules[module])["_config"][name].default
            setattr(sys.modules[module], name, default)
        for (module, name), value in before.items():
            setattr(sys.modules[module], name, value)

    return Setting("compiler", read, write)


def _default_device() -> Any:
    """Without computing anything, unlike ``torch.get_default_device``: a mode may be left."""
    import torch

    context = getattr(vars(torch)["_GLOBAL_DEVICE_CONTEXT"], "device_context", None)
    return context and context.device


def _pop_function_modes(count: int) -> None:
    import torch

    stack: Any = torch.overrides
    while torch._C._len_torch_function_stack() > count:
        stack._pop_mode()


def _pop_dispatch_modes(count: int) -> None:
    import torch
    from torch.utils import _python_dispatch

    stack: Any = _python_dispatch
    while torch._C._len_torch_dispatch_stack() > count:
        stack._pop_mode()


def _enter_inference_mode(enabled: bool) -> None:
    import torch

    _ENTERED.append(torch.inference_mode(enabled))
    _ENTERED[-1].__enter__()


_ENTERED: list[Any] = []  # a mode ends with its object


def _matmul_precision() -> str:
    import torch

    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set in the old and in the new way
        return "mixed"


def _flushes_denormals() -> bool:
    return sys.float_info.min / 2 == 0.0


def _set_reduction(setter: Callable[..., None], value: Any) -> None:
    """The value is one flag, or one and whether split-K is allowed."""
    setter(*value) if isinstance(value, tuple) else setter(value)


def _cuda_device() -> int | None:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _set_cuda_device(index: int | None) -> None:
    import torch

    if index is not None:
        torch.cuda.set_device(index)


def _cuda_stream() -> Any:
    import torch

    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _set_cuda_stream(stream: Any) -> None:
    import torch

    if stream is not None:
        torch.cuda.set_stream(stream)
