"""Adapters to libraries of sequence mixers, compared with the recurrence in float64: on stand-ins
with the signatures of the libraries, and on the functions in torch of those that are installed."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import library_stand_ins
import mixer_stand_ins
import naive
import naive_mixers
import pytest
import torch
from adapters import set_capability

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import MixerBackwardInputs, MixerInputs, declared_refusal
from cpbench.core.problem import Problem
from cpbench.core.spec import Spec
from cpbench.core.tolerance import limits
from cpbench.inputs import Recipe
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World
from cpbench.verify import check

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("fla", "transformers")}
LIMIT = {"float32": 1e-5, "bfloat16": 1.2e-2, "float16": 2e-3}
DOCUMENTS = (20, 1, 69)
MASKS = {"causal": (0,), "causal_document:doc_lens=[20,1,69]": (0, 20, 21)}
TOKENS = sum(DOCUMENTS)
ADAPTERS = sorted(
    name for name, info in registry.operators().items() if info.mixer and info.mixer != name
)
NAIVE = [name for name in ADAPTERS if "cpu" in registry.operators()[name].devices]
KERNELS = [name for name in ADAPTERS if name not in NAIVE]


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    library_stand_ins.install(monkeypatch, mixer_stand_ins.modules())
    set_capability(monkeypatch, (9, 0))


def load(name: str, **params: Any) -> tuple[registry.OperatorInfo, Any]:
    info = registry.operator_info(name)
    return info, registry.implementation(info, params)


def problem_of(info: registry.OperatorInfo, **changes: Any) -> Problem:
    shape = {
        "batch": 2, "seq_q": TOKENS, "seq_k": TOKENS, "heads_q": 3, "heads_kv": 3, "head_dim": 16,
        "head_dim_v": 8, "dtype": info.dtypes[0],
        "direction": "fwd_bwd" if info.backward_on else "fwd",
    }  # fmt: skip
    return Problem(**{**shape, **changes})


def inputs(info: registry.OperatorInfo, problem: Problem) -> check.Tensors:
    """Of keys of length 1, all half-lives, and weak betas."""
    mask, layout = masks.build("causal", TOKENS), layouts.build("contiguous", TOKENS, 1)
    world = World.of(problem, mask, layout).with_inputs_of(info)
    positions = layout.positions(0)
    return check.make_inputs(world.problem, positions, positions, Recipe(0, Spec("gates")), "cpu")


def errors(name: str, mask: str, change: Any = None, **changes: Any) -> dict[str, float]:
    """Errors of an adapter by result against the recurrence; ``change`` modifies its plan."""
    info, op = load(name)
    problem, built = problem_of(info, **changes), masks.build(mask, TOKENS)
    assert op.unsupported(problem, built, "cpu") is None
    tensors = inputs(info, problem)
    dout = tensors.pop("dout", None)
    plan = op.prepare(built, problem, "cpu")
    x = MixerInputs.of(tensors)
    out, state = op.forward(x, plan if change is None else change(plan))
    assert out.dtype == x.v.dtype
    assert op.recurrence == info.mixer
    leaves = {key: y.double().requires_grad_() for key, y in tensors.items()}
    expected = mixer_stand_ins.mix(leaves, info.mixer, problem.softmax_scale, MASKS[mask])
    found = {"out": naive.error(out, expected[0])}
    if state is not None:
        assert state.dtype == torch.float32
        found["state"] = naive.error(state, expected[1])
    if dout is not None:
        gradients = op.backward(MixerBackwardInputs(dout, x, out, state), plan)
        wanted = torch.autograd.grad(expected[0], tuple(leaves.values()), dout.double())
        for key, gradient, value in zip(leaves, gradients, wanted, strict=True):
            assert gradient.dtype == tensors[key].dtype
            found[f"d{key}"] = naive.error(gradient, value)
    return found


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [name for name in ADAPTERS if not name.startswith("transf")])
def test_equals_the_recurrence(name: str, mask: str) -> None:
    dtypes = registry.operator_info(name).dtypes
    for dtype in dtypes[:2]:
        found = errors(name, mask, dtype=dtype)
        assert max(found.values()) < LIMIT[dtype], found
        stateless = name in ("fla.naive_linear", "fla.naive_retention")
        assert ("state" in found) != stateless


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("name", ["fla.gla", "fla.naive_kda", "mamba_ssm.ssd"])
def test_documents_that_are_dropped_are_found(name: str) -> None:
    mask = list(MASKS)[1]
    found = errors(name, mask, lambda plan: replace(plan, lengths=(TOKENS,)))
    assert found["out"] > 0.1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NAIVE)
def test_functions_in_torch_of_installed_libraries(name: str, mask: str) -> None:
    library = name.partition(".")[0]
    if not INSTALLED[library]:
        pytest.skip(f"{library} is not installed: {registry.operator_info(name).install}")
    found = errors(name, mask)
    assert max(found.values()) < LIMIT["float32"], found


@pytest.mark.usefixtures("_stand_ins")
def test_refusals() -> None:
    def refusal(name: str, tokens: int = TOKENS, mask: str = "causal", **changes: Any) -> str:
        info, op = load(name)
        problem = problem_of(info, **{"seq_q": tokens, "seq_k": tokens, **changes})
        reason = op.unsupported(problem, masks.build(mask, tokens), "cpu")
        assert reason is not None
        assert len(reason.splitlines()) == 1
        return str(reason)

    assert refusal("fla.naive_deltanet", scale=1.0) == (
        "fla.naive_deltanet needs the scale 0.25, not 1"
    )
    assert refusal("transformers.gated_delta", scale=1.0).endswith("needs the scale 0.25, not 1")
    assert refusal("fla.naive_retention", 2796) == (
        "fla.naive_retention overflows float32 from 2796 tokens of a document on, and one has 2796"
    )
    _, op = load("fla.naive_retention")
    half = masks.build("causal_document:doc_lens=[2000,2000]", 4000)
    problem = problem_of(registry.operator_info("fla.naive_retention"), seq_q=4000, seq_k=4000)
    assert op.unsupported(problem, half, "cpu") is None
    assert "needs head_dim a multiple of 16 up to 256, not 20" in refusal("fla.ssd", head_dim=20)
    with pytest.raises(ValueError, match=r"mamba_ssm\.ssd: chunk = 100 is not one of 64, 128, 256"):
        load("mamba_ssm.ssd", chunk=100)


def test_devices_that_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, words in (
        (None, "needs a CUDA device; torch sees none"),
        ((7, 5), "needs compute capability from 8.0 on; this device has 7.5"),
    ):
        set_capability(monkeypatch, capability)
        for name in KERNELS:
            info, op = load(name)
            built = masks.build("causal", TOKENS)
            assert op.unsupported(problem_of(info), built, "cuda") == f"{name} {words}"


@pytest.mark.skipif(not INSTALLED["fla"], reason="fla is not installed")
def test_where_retention_overflows() -> None:
    """One token more than are taken."""
    from fla.ops.retention.naive import naive_retention

    for tokens, finite in ((2795, True), (2796, False)):
        q, k, v = (torch.ones(1, 1, tokens, 1) for _ in range(3))
        assert bool(naive_retention(q, k, v).isfinite().all()) == finite


def test_declarations() -> None:
    assert {registry.operator_info(name).mixer for name in ADAPTERS} == {*naive_mixers.NAMES} - {
        "ttt"
    }
    for name in ADAPTERS:
        info, own = (
            registry.operator_info(name),
            registry.operator_info(registry.operator_info(name).mixer),
        )
        assert info.install
        assert info.gates == own.gates
        assert bool(info.unproven) == (name in KERNELS)
        assert info.devices == (("cuda",) if name in KERNELS else ("cpu", "cuda"))
        # What rounds to 16 bits before it adds to a state may be off by as much.
        state = limits("bfloat16", info, 0.0)
        assert ("state" in state) != (name in KERNELS)


def test_a_missing_library_is_refused_with_its_installation() -> None:
    for name in NAIVE:
        if INSTALLED[name.partition(".")[0]]:
            continue
        info = registry.operator_info(name)
        assert declared_refusal(info, problem_of(info), "cpu") == (
            f"{name} needs the Python package fla, which is not installed: pip install "
            '"cpbench[mixer-peers]"'
        )
