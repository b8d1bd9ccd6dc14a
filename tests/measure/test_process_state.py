"""What operators share in a process: every change is named and undone."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench.measure.process_state import ProcessState

ENTERED: list[Any] = []  # a mode ends with its object


def entered(context: Any) -> None:
    ENTERED.append(context)
    context.__enter__()


def set_other_threads() -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)


def set_variable(name: str, value: str) -> Callable[[], None]:
    return lambda: os.environ.__setitem__(name, value)


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "threads": (set_other_threads, "threads "),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"), "matmul precision highest -> medium"
    ),
    "tf32": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "fp32 precision of cuda"
    ),
    "fp32_precision": (
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        "fp32 precision of mkldnn matmul none -> bf16",
    ),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "default dtype"),
    "device": (lambda: torch.set_default_device("meta"), "default device None -> meta"),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True), "deterministic 0 -> 1"
    ),
    "autocast": (lambda: entered(torch.autocast("cpu", torch.bfloat16)), "cpu autocast"),
    "autocast dtype": (
        lambda: torch.set_autocast_dtype("cuda", torch.bfloat16), "cuda autocast dtype"
    ),
    "grad mode": (lambda: torch.set_grad_enabled(False), "grad mode True -> False"),
    "inference mode": (lambda: entered(torch.inference_mode()), "inference mode"),
    "anomaly detection": (lambda: torch.autograd.set_detect_anomaly(True), "anomaly"),
    "denormals": (lambda: torch.set_flush_denormal(True), "flush denormals False -> True"),
    "cudnn": (lambda: setattr(torch.backends.cudnn, "benchmark", True), "cudnn benchmark"),
    "SDPA": (lambda: torch.backends.cuda.enable_flash_sdp(False), "SDPA flash True -> False"),
    "mkldnn": (lambda: setattr(torch.backends.mkldnn, "enabled", False), "mkldnn enabled"),
    "reductions": (
        lambda: setattr(
            torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False
        ),
        "bf16 reduced precision reduction",
    ),
    "function mode": (lambda: entered(TorchFunctionMode()), "function modes 0 -> 1"),
    "dispatch mode": (lambda: entered(TorchDispatchMode()), "dispatch modes 0 -> 1"),
    "variable": (set_variable("OMP_NUM_THREADS", "77"), "environment OMP_NUM_THREADS"),
    "inherited variable": (set_variable("PATH", ""), "environment PATH"),
    "working directory": (lambda: os.chdir("/"), "working directory"),
    "signal handler": (
        lambda: signal.signal(signal.SIGUSR2, lambda *_: None), "signal handler SIGUSR2"
    ),
    "gc": (gc.disable, "gc True -> False"),
    "gc threshold": (lambda: gc.set_threshold(10**6), "gc threshold"),
    "switch interval": (lambda: sys.setswitchinterval(1.0), "switch interval"),
    "seed": (lambda: torch.manual_seed(torch.initial_seed() + 1), "torch seed"),
    "replaced function": (
        lambda: setattr(F, "scaled_dot_product_attention", print),
        "replaced torch.nn.functional.scaled_dot_product_attention",
    ),
    "replaced method": (
        lambda: setattr(torch.Tensor, "matmul", print), "replaced torch.Tensor.matmul"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_undone(name: str) -> None:
    change, words = CHANGES[name]
    state = ProcessState()
    assert state.changes() == []
    try:
        change()
        assert any(text.startswith(words) for text in state.changes()), state.changes()
    finally:
        assert state.restore()
    assert state.changes() == []
    assert state.restore() == []


def test_a_core_that_was_given_up_is_got_back() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core")
    state = ProcessState()
    os.sched_setaffinity(0, {min(cores)})
    (change,) = state.restore()
    assert change.startswith("affinity")
    assert os.sched_getaffinity(0) == cores


def test_settings_of_the_compiler_are_reset() -> None:
    import torch._inductor.config as inductor

    state, default = ProcessState(), inductor.max_autotune
    inductor.max_autotune = not default
    assert state.restore() == ["compiler torch._inductor.config.max_autotune"]
    assert inductor.max_autotune == default


def test_random_numbers_are_put_back_without_a_word() -> None:
    state = ProcessState()
    drawn = [(random.random(), np.random.rand(), float(torch.rand(1))) for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert state.restore() == []
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == drawn[0]


def test_what_only_its_own_library_reads_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ProcessState()
    monkeypatch.setenv("SOME_LIBRARY_PATH", str(Path.cwd()))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere")
    assert state.restore() == []
