"""Which GPU a rank takes, where its launcher shows it all of the machine, or its own."""

from __future__ import annotations

import pytest
import torch

from cpbench.measure.device.opening import device_shortage, gpu_index, shared_gpu


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None) -> None:
    """As torch on a machine with GPUs: how many it sees, and CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("count", "visible", "indices"),
    [
        (4, None, [0, 1, 2, 3]),
        (4, "4,5,6,7", [0, 1, 2, 3]),
        (1, "2", [0, 0, 0, 0]),  # another one in each rank
        (1, "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", [0, 0, 0, 0]),
    ],
)
def test_a_rank_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, indices: list[int]
) -> None:
    see_gpus(monkeypatch, count, visible)
    assert device_shortage("cuda", 4) is None
    assert [gpu_index(local_rank) for local_rank in range(4)] == indices


@pytest.mark.parametrize(
    ("count", "visible"), [(0, None), (0, "0"), (1, None), (2, None), (1, "0,9")]
)
def test_a_machine_with_too_few_gpus(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None
) -> None:
    see_gpus(monkeypatch, count, visible)
    assert device_shortage("cuda", 4) == (
        f"this machine needs 4 CUDA devices, one per rank; torch sees {count}"
    )
    assert device_shortage("cpu", 4) is None


def test_ranks_that_see_the_same_gpu() -> None:
    assert shared_gpu([("n1", None), ("n1", None)]) is None  # CPUs
    assert shared_gpu([("n1", "GPU-1"), ("n1", "GPU-2"), ("n2", "GPU-3")]) is None
    assert shared_gpu([("n1", "GPU-1"), ("n2", "GPU-2"), ("n2", "GPU-2")]) == (
        "2 ranks on n2 see only the same GPU, GPU-2: CUDA_VISIBLE_DEVICES must name all GPUs of a "
        "machine, or one for each of its ranks"
    )
