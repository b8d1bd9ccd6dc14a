"""Refusals of adapters, mistakes that their stand-ins detect, and their declarations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from adapters import (
    LIMIT,
    PAGED,
    PER_HEAD,
    SHAPES,
    SUPPORTED,
    block_masks,
    compare,
    inputs,
    install_stand_ins,
    is_correct,
    load,
    problem_of,
    set_capability,
    windowed_documents,
    with_direction,
)
from heavy_packages import HEAVY
from limits import LIMIT_S

from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import declared_refusal
from cpbench.masks.attn_mask import AttnMask


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    install_stand_ins(monkeypatch)


# --- refusals -------------------------------------------------------------------------------------


def refusal(name: str, text: str, tokens: int = 64, **changes: Any) -> str:
    info, op = load(name)
    built = masks.build_heads(text, tokens, 4) if name in PER_HEAD else masks.build(text, tokens)
    problem = problem_of(built, SHAPES[0], changes.pop("dtype", "bfloat16"), **changes)
    reason = op.unsupported(with_direction(info, problem), built, "cpu")
    assert reason is not None
    assert len(reason.splitlines()) == 1
    return reason


BLOCKS = "block_sparse_uniform:block_size=64"


@pytest.mark.parametrize(
    ("name", "capability", "changes", "words"),
    [
        ("flash_attn.2", (7, 5), {}, "needs compute capability from 8.0 on; this device has 7.5"),
        ("flash_attn.2", None, {}, "needs a CUDA device; torch sees none"),
        ("flash_attn.2", (8, 0), {"head_dim": 60}, "a multiple of 8 up to 256, not 60"),
        ("flash_attn.3", (10, 0), {}, "needs compute capability 9.0; this device has 10.0"),
        ("flash_attn.3", (8, 9), {}, "needs compute capability 9.0; this device has 8.9"),
        ("te.cudnn", (8, 0), {"head_dim": 256}, "head_dim up to 128 except on Hopper, not 256"),
        ("flashinfer.dense", (8, 0), {"head_dim": 96}, "needs head_dim 64, 128, 256, not 96"),
        ("magi.ffa", (9, 0), {"head_dim": 256}, "a multiple of 8 up to 128, not 256"),
        ("magi.ffa", (8, 0), {}, "needs compute capability 9.0; this device has 8.0"),
        ("flashmask", (10, 0), {}, "needs compute capability 9.0; this device has 10.0"),
        ("vsa.kernel", (9, 0), {"head_dim": 80}, "needs head_dim 16, 32, 64, 128, 256, not 80"),
        ("vsa.kernel", (9, 0), {"scale": 0.5}, "needs the scale 0.125, not 0.5"),
    ],
)
def test_refusals_say_why(
    name: str, capability: Any, changes: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_capability(monkeypatch, capability)
    reason = refusal(name, BLOCKS if name in PER_HEAD else "causal", **changes)
    assert (
        reason == f"{name} {words}"
        or reason == f"{name} needs {words}"
        or (reason.startswith(f"{name} needs head_dim") and reason.endswith(words))
    )


def test_refusals_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a multiple of block_k = 32 keys, not 70" in refusal(
        "flashinfer.block_sparse", "causal", 70
    )
    rows = [(1, 2, 0, 3, -9, 9), (3, 4, 0, 3, -9, 9)]
    mask = AttnMask.from_slices(6, 4, rows)
    _, op = load("flashmask")
    reason = op.unsupported(problem_of(mask, SHAPES[0], "bfloat16"), mask, "cpu")
    assert "key 0 is hidden from 3 intervals of queries; FlashMask supports two" in reason
    set_capability(monkeypatch, (8, 0))
    assert "9.0 or later for documents" in refusal("te.cudnn", "causal_document:doc_lens=[60,4]")
    set_capability(monkeypatch, (9, 0))
    mask = windowed_documents(
        -1, 0, ((3, 5), (4, 2))
    )  # the second document has more queries than keys
    _, op = load("te.cudnn")
    reason = op.unsupported(problem_of(mask, SHAPES[0], "bfloat16"), mask, "cpu")
    assert "at least as many keys as queries in every document" in reason
    set_capability(monkeypatch, (8, 0))
    with pytest.raises(ValueError, match="backend = 'tk' is not one of auto, sm90, triton"):
        load("vsa.kernel", backend="tk")
    _, op = load("vsa.kernel", backend="sm90")
    heads = block_masks(128, 4)
    reason = op.unsupported(problem_of(heads, SHAPES[0], "bfloat16"), heads, "cpu")
    assert "backend = sm90 needs compute capability 9.0" in reason


@pytest.mark.parametrize(("left", "right"), [(-1, 3), (1, -1), (1, 5)])
def test_windows_that_flash_attention_2_misreads_are_refused(left: int, right: int) -> None:
    mask = windowed_documents(left, right, ((10, 3),))
    problem = problem_of(mask, SHAPES[0], "float16")
    _, op = load("flash_attn.2")
    reason = op.unsupported(problem, mask, "cpu")
    assert "misreads the right bound of this window: it has 10 queries" in reason
    assert not is_correct("flash_attn.2", mask, problem)
    compare("flash_attn.3", mask, problem)


# --- stand-ins detect mistakes --------------------------------------------------------------------


def _change(field: str, function: Any) -> Callable[[Any], Any]:
    """A function that changes one field of a plan."""
    return lambda plan: replace(plan, **{field: function(getattr(plan, field))})


WRONG = [
    *(
        (name, "sliding_window_causal:window=7", change)
        for name in ("flash_attn.2", "flash_attn.3", "te.cudnn")
        for change in (
            _change("left", lambda x: x + 1),
            _change("left", lambda x: x - 1),
            _change("right", lambda x: -1),
            lambda plan: replace(plan, left=plan.right, right=plan.left),
            _change("scale", lambda x: x * 1.1),
        )
    ),
    *(
        (name, "causal_document:doc_lens=[30,34]", change)
        for name in ("flash_attn.2", "flash_attn.3", "te.cudnn")
        for change in (
            _change("cu_q", lambda x: x.clamp(max=95)),
            _change("max_q", lambda x: x - 1),
            _change("cu_k", lambda x: x.long()),
        )
    ),
    ("magi.ffa", "sliding_window:window=7", _change("types", torch.zeros_like)),
    ("magi.ffa", "causal", _change("types", lambda x: x * 2)),
    ("magi.ffa", "causal", _change("q", lambda x: x.repeat(1, 1) + 1)),
    ("flashmask", "causal", _change("causal", lambda x: not x)),
    ("flashmask", "sliding_window_causal:window=7", _change("startend", lambda x: x + 1)),
    ("flashmask", "causal", _change("startend", lambda x: x[:1])),
]


@pytest.mark.parametrize(("name", "text", "change"), WRONG)
def test_a_wrong_plan_is_detected(name: str, text: str, change: Any) -> None:
    mask = masks.build(text, 64)
    problem = problem_of(mask, SHAPES[0], "bfloat16")
    assert is_correct(name, mask, problem)
    assert not is_correct(name, mask, problem, change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vsa.kernel", _change("count", lambda x: x + 1)),
        ("vsa.kernel", _change("index", lambda x: x.flip(-1))),
        ("vsa.kernel", _change("sizes", lambda x: x - 1)),
        ("vsa.kernel", _change("index", lambda x: x.long())),
        ("flashinfer.variable", _change("repeat", lambda x: 1)),
    ],
)
def test_wrong_lists_are_detected(name: str, change: Any) -> None:
    mask = block_masks(256, 4)
    problem = problem_of(mask, SHAPES[0], "bfloat16")
    assert is_correct(name, mask, problem)
    assert not is_correct(name, mask, problem, change)


def test_a_wrong_base_of_the_lse_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, heads = masks.build("causal", 64), block_masks(128, 4)
    monkeypatch.setattr("cpbench.kernels.libraries.flashinfer.LN2", 1.0)
    monkeypatch.setattr("cpbench.kernels.libraries.vsa_kernel.LN2", 1.0)
    for name, built, params in (
        ("flashinfer.dense", mask, {}),
        ("flashinfer.block_sparse", mask, {}),
        ("flashinfer.variable", heads, {}),
        ("vsa.kernel", heads, {"backend": "triton"}),
    ):
        assert not is_correct(name, built, problem_of(built, SHAPES[0], "bfloat16"), **params)


def test_alignment_matters() -> None:
    fused = sys.modules["transformer_engine.pytorch.cpp_extensions.fused_attn"]
    mask = masks.build("causal", 9, seq_q=4)
    problem = problem_of(mask, SHAPES[0], "bfloat16")
    q, k, v, _ = (x.contiguous() for x in inputs(problem))
    results = []
    for kind in ("causal_bottom_right", "causal"):
        out, _ = fused.fused_attn_fwd(
            True, 4, 9, torch.tensor([0, 4, 8], dtype=torch.int32),
            torch.tensor([0, 9, 18], dtype=torch.int32), q, k, v, torch.bfloat16,
            fused.FusedAttnBackend["F16_arbitrary_seqlen"], attn_scale=0.125,
            qkv_layout="bshd_bshd_bshd", o_format="bshd", attn_mask_type=kind, window_size=(-1, 0),
        )  # fmt: skip
        results.append(naive.error(out, naive.attention(q, k, v, q, mask)["out"]))
    assert results[0] < LIMIT["bfloat16"] < results[1]


def test_calls_are_bound_as_by_the_libraries() -> None:
    q = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    flash = sys.modules["flash_attn.flash_attn_interface"]._flash_attn_forward
    arguments = {
        "dropout_p": 0.0, "softmax_scale": 0.125, "causal": True, "window_size_left": -1,
        "window_size_right": 0, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
    }  # fmt: skip
    flash(q, q, q, **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'window_size'"):
        flash(q, q, q, **arguments, window_size=(-1, 0))
    with pytest.raises(TypeError, match="missing a required argument: 'causal'"):
        flash(q, q, q, **{key: value for key, value in arguments.items() if key != "causal"})
    with pytest.raises(TypeError, match="softmax_scale = None is not of type float"):
        flash(q, q, q, **{**arguments, "softmax_scale": None})
    with pytest.raises(TypeError, match=r"window_size_left = -1\.0 is not of type int"):
        flash(q, q, q, **{**arguments, "window_size_left": -1.0})
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        flash(q.float(), q.float(), q.float(), **arguments)
    backward = sys.modules["flash_attn_interface"]._flash_attn_backward
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        backward(q, q, q, q, q, torch.zeros(1, 2, 8), causal=True)
    with pytest.raises(AssertionError, match="the gradient is lost"):
        backward(q, q, q, q, q, torch.zeros(1, 2, 8), softmax_scale=0.125)
    transposed = torch.zeros(1, 8, 2).transpose(1, 2)
    buffers = {"dq": q.clone(), "dk": q.clone(), "dv": q.clone()}
    with pytest.raises(AssertionError, match="no strides of the lse"):
        backward(q, q, q, q, q, transposed, softmax_scale=0.125, **buffers)


# --- declarations ---------------------------------------------------------------------------------


def test_all_adapters_are_tested() -> None:
    declared = registry.operators().items()
    unproven = {name for name, info in declared if info.unproven and info.kind == "attention"}
    assert unproven == {*SUPPORTED, *PER_HEAD, *PAGED}
    for name in unproven:
        info = registry.operator_info(name)
        assert info.install
        assert info.devices == ("cuda",)


def test_a_missing_package_is_refused_with_its_installation() -> None:
    missing = registry.OperatorInfo(
        name="x", summary="", source="", load="", requires=("no_such_package",), install="pip x"
    )
    problem = problem_of(masks.build("causal", 8), SHAPES[0], "bfloat16")
    reason = declared_refusal(missing, problem, "cuda")
    assert reason == "x needs the Python package no_such_package, which is not installed: pip x"


def test_the_list_of_operators_imports_no_library() -> None:
    code = f"""
import sys
from cpbench.tools import listing
for device in ("cpu", "cuda"):
    for row in listing.rows("operators", device):
        if row["operator"] in {sorted([*SUPPORTED, *PER_HEAD])}:
            print(row["here"], "|", row["summary"])
assert not set({HEAVY}) & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * (len(SUPPORTED) + len(PER_HEAD))
    assert all("never run; written against" in line for line in lines)
    on_cpu, on_cuda = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert all(line.startswith("no: runs on cuda, not on cpu |") for line in on_cpu)
    for line in on_cuda:
        assert "never run |" in line or line.startswith("no: needs ")
