"""Peak rates: all are measured, and only matrix products limit the rate of a case."""

from __future__ import annotations

import pytest

from cpbench.measure import peaks
from cpbench.measure.device.cpu import Cpu
from cpbench.worker.evaluate import _best_product


class OneRank:
    """The control of a single rank."""

    def barrier(self) -> None:
        pass

    def max(self, value: float) -> float:
        return value


def test_every_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peaks.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(peaks.MATRIX_SIZE, "cpu", 32)
    rates = peaks.measure_peaks(Cpu(1), OneRank(), ["bfloat16"])  # type: ignore[arg-type]
    of_gpus = {peaks.TO_DEVICE, peaks.TO_HOST, peaks.HOST_LATENCY}
    assert set(rates) == {"bfloat16", "float32", *peaks.NO_PRODUCTS} - of_gpus
    assert min(rates.values()) > 0


def test_only_matrix_products_are_products() -> None:
    others = dict.fromkeys(peaks.NO_PRODUCTS, 100.0)
    assert _best_product({"float32": 0.1, "bfloat16": 0.2, **others}) == 0.2
