"""Runs a function on several ranks of a Gloo group, within a time limit.

Processes come from a fork server that has torch loaded, so that a gang starts in a fraction of a
second.  ``function`` must be importable: a top-level function of a test module.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from limits import LIMIT_S

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "cpbench.api", "cpbench.verify.check"]
)


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 400) -> list:
    """Run ``function(rank, size, *args)`` on every rank; returns the result of each.

    Raises:
        AssertionError: when a rank fails or does not answer in time; all ranks are killed.
    """
    answers = _CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_run_rank, args=(answers, folder, rank, size, function, args))
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        try:
            results: dict[int, Any] = {}
            while len(results) < size:
                assert _readable(answers, timeout_s), f"no answer within {timeout_s} s"
                rank, failure, value = answers.get()
                assert not failure, f"rank {rank}:\n{failure}"
                results[rank] = value
            return [results[rank] for rank in range(size)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _readable(queue: Any, timeout_s: float) -> bool:
    return bool(queue._reader.poll(timeout_s))


def _run_rank(
    answers: Any, folder: str, rank: int, size: int, function: Callable[..., Any], args: tuple
) -> None:
    try:
        import torch
        import torch.distributed as dist

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", size)
        timeout = timedelta(seconds=LIMIT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        value = function(rank, size, *args)
        answers.put((rank, "", value))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
