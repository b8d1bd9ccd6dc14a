"""A plugin package with an operator, a strategy and a mask, registered through entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from plugin_package import install_plugin

CODE = '''
"""Declarations first; torch is imported by what a worker loads."""
from dataclasses import dataclass

from cpbench.core.registry import OperatorInfo, StrategyInfo


@dataclass(frozen=True)
class Plan:
    visible: object
    scale: float


class Textbook:
    """One dense softmax; gradients from autograd."""

    def unsupported(self, problem, mask, device):
        return None

    def prepare(self, mask, problem, device):
        import torch
        return Plan(torch.as_tensor(mask.to_dense(), device=device), problem.softmax_scale)

    def forward(self, qkv, plan):
        import torch
        q, k, v = qkv
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k).float() * plan.scale
        scores = scores.masked_fill(~plan.visible, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
        return torch.einsum("bhst,bthd->bshd", weights.to(q.dtype), v), lse

    def backward(self, x, plan):
        import torch
        leaves = [y.detach().requires_grad_() for y in x.qkv]
        with torch.enable_grad():
            again, _ = self.forward(leaves, plan)
        return torch.autograd.grad(again, leaves, x.dout)


class Alone:
    """One rank, nothing sent."""

    def unsupported(self, world):
        return None if world.size == 1 else "alone runs on 1 rank"

    def prepare(self, op, world, rank):
        return op.prepare(world.subproblem([0], [0]))

    def forward(self, qkv, plan, op, comm, need_lse):
        out, lse = op.forward(qkv, plan)
        return out, lse, (*qkv, out, lse)

    def backward(self, dout, saved, plan, op, comm):
        from cpbench.core.operator import BackwardInputs
        return op.backward(BackwardInputs(dout, *saved), plan)


operator = OperatorInfo(name="acme.textbook", summary="dense softmax", source="a textbook",
                        load="acme_attention:Textbook", external_lse=False)
strategy = StrategyInfo(name="acme.alone", summary="by itself", source="a hermit",
                        load="acme_attention:Alone", layouts=("contiguous",))
again = OperatorInfo(name="reference", summary="taken", source="", load=dict)


def acme_checkers(seq_len, *, block=64):
    """j <= i, block by block."""
    from cpbench.masks.attn_mask import AttnMask
    starts = range(0, seq_len, block)
    return AttnMask.from_slices(seq_len, seq_len, [
        (s, min(s + block, seq_len), 0, min(s + block, seq_len), -seq_len, 0) for s in starts])


def causal(seq_len):
    """A name that is taken."""
    return acme_checkers(seq_len)
'''
GOOD = """
[project.entry-points."cpbench.operators"]
textbook = "acme_attention:operator"
[project.entry-points."cpbench.strategies"]
alone = "acme_attention:strategy"
[project.entry-points."cpbench.masks"]
checkers = "acme_attention:acme_checkers"
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return install_plugin(tmp_path_factory.mktemp("plugin"), {"acme_attention": CODE}, GOOD)


def cpbench(environ: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("cpbench"), *words],
        env={**environ, "TMPDIR": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [("operators", "acme.textbook"), ("strategies", "acme.alone"), ("masks", "acme_checkers")],
)
def test_listed(plugin: dict[str, str], tmp_path: Path, kind: str, name: str) -> None:
    result = cpbench(plugin, tmp_path, "list", kind)
    assert result.returncode == 0, result.stderr
    assert name in result.stdout
    assert name not in cpbench(dict(os.environ), tmp_path, "list", kind).stdout


def test_a_plugin_runs_and_passes_the_check(plugin: dict[str, str], tmp_path: Path) -> None:
    result = cpbench(
        plugin,
        tmp_path,
        "bench",
        "--operator",
        "acme.textbook",
        "--strategy",
        "acme.alone",
        "--mask",
        "acme_checkers:block=50",
        "--seq-len",
        "200",
        "--num-heads-q",
        "2",
        "--head-dim",
        "16",
        "--max-seconds",
        "0.2",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)
    assert (row["status"], row["operator"], row["strategy"], row["mask"]) == (
        "ok",
        "acme.textbook",
        "acme.alone",
        "acme_checkers:block=50",
    )
    assert 0 < row["worst_error"] < 1e-5
    assert row["time_ms"] > 0


@pytest.mark.parametrize(
    ("group", "target", "parts"),
    [
        ("operators", "again", ["'reference' is registered twice", "cpbench.operators"]),
        ("masks", "causal", ["'causal' is registered twice", "cpbench.masks"]),
        ("strategies", "operator", ["is not a StrategyInfo", "cpbench.strategies"]),
        ("operators", "nothing", ["cannot be loaded", "AttributeError"]),
    ],
)
def test_a_bad_plugin_is_one_line(
    tmp_path: Path, group: str, target: str, parts: list[str]
) -> None:
    # The files that pip would install, without pip, which takes seconds.
    site = tmp_path / "site"
    (site / "acme_attention-1.dist-info").mkdir(parents=True)
    (site / "acme_attention.py").write_text(CODE)
    about = site / "acme_attention-1.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-attention\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[cpbench.{group}]\nx = acme_attention:{target}\n")
    environ = {**os.environ, "PYTHONPATH": str(site)}
    for words in (("list", group), ("bench",)):
        result = cpbench(environ, tmp_path, *words)
        assert (result.returncode, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1, result.stderr
        for part in ("acme_attention", *parts):
            assert part in result.stderr
    if target == "causal":  # only once, since doctor loads torch
        doctor = cpbench(environ, tmp_path, "doctor", "--json")
        assert doctor.returncode == 1
        broken = [row["what"] for row in json.loads(doctor.stdout) if row["verdict"] == "broken"]
        assert broken == [group]
