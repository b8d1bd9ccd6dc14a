"""A simulated GPU with one stream, in place of ``torch.cuda`` and the host's clock.

Launching takes the host's time, running the device's; work runs in order, from when it is queued or
the work before it has ended.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpbench.measure.device import cuda

FLUSH_US = 30.0


class SimulatedGpu:
    """Attributes:
    host_us, device_us: now on the host, and when the device will have run all that is queued.
    log: names of what was queued, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host_us = self.device_us = 0.0
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at_us = max(gpu.device_us, gpu.host_us)
                gpu.log.append("event")

            def query(self) -> bool:
                return self.at_us <= gpu.host_us

            def synchronize(self) -> None:
                gpu.host_us = max(gpu.host_us, self.at_us)

            def elapsed_time(self, end: Event) -> float:
                return (end.at_us - self.at_us) / 1e3

        for name, value in (
            ("Event", Event), ("synchronize", self.synchronize), ("set_device", lambda index: None),
            ("get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20)),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda.time, "perf_counter", lambda: gpu.host_us / 1e6)
        real_zeros = torch.zeros

        def zeros(*size: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") != "cuda":
                return real_zeros(*size, **kwargs)
            return SimpleNamespace(zero_=lambda: gpu.launch("flush", 3.0, FLUSH_US))

        monkeypatch.setattr(torch, "zeros", zeros)

    def launch(self, name: str, host_us: float, device_us: float) -> None:
        """Queue a kernel that takes so long to launch and to run."""
        self.log.append(name)
        self.host_us += host_us
        self.device_us = max(self.device_us, self.host_us) + device_us

    def synchronize(self) -> None:
        self.host_us = max(self.host_us, self.device_us)
