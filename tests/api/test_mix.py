"""``cpbench.mix`` against the recurrence in float64, and in PyTorch as attention is."""

from __future__ import annotations

import math
from typing import Any

import naive
import naive_mixers
import pytest
import torch
from naive_mixers import NAMES, TENSORS, Named
from torch.utils.checkpoint import checkpoint

import cpbench
from cpbench import masks

SCALE = 0.3


def mask_of(lengths: tuple[int, ...]) -> Any:
    return masks.build("causal_document", sum(lengths), doc_lens=list(lengths))


def starts_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[:i]) for i in range(len(lengths)))


def call(x: Named, mixer: str, **options: Any) -> tuple[Named, torch.Tensor, torch.Tensor]:
    """Gradients by name, out and state of :func:`cpbench.mix` for seeded gradients of both."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    out, state = cpbench.mix(**leaves, mixer=mixer, **options)
    found = torch.autograd.grad((out, state), tuple(leaves.values()), seeds(out, state))
    return dict(zip(leaves, found, strict=True)), out.detach(), state.detach()


def seeds(out: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(y.shape, generator=random, dtype=torch.float64).to(y) for y in (out, state)
    )


def wrong(
    x: Named, mixer: str, chunk: int, lengths: tuple[int, ...] | None, tolerance: float
) -> dict[str, list[float]]:
    """Errors of all heads of out, state and gradients, of those that exceed the tolerance.

    exp is taken of sums of 64 gates; of 1,280 nats, their rounding is a hundred times that of one
    gate, which shows in the gradient of the gates of the last head.
    """
    starts = starts_of(lengths) if lengths else (0,)
    got, out, state = call(
        x, f"{mixer}:chunk={chunk}", scale=SCALE, mask=mask_of(lengths) if lengths else None
    )
    wanted, *true = naive_mixers.gradients(x, mixer, SCALE, *seeds(out, state), starts, chunk)
    pairs = {"out": (out, true[0]), "state": (state, true[1])}
    pairs |= {f"d{name}": (got[name], wanted[name]) for name in x}
    found = {}
    for name, (a, b) in pairs.items():
        errors = naive_mixers.head_errors(a, b, 1 if "state" in name else 2)
        allowed = [tolerance] * (len(errors) - 1) + [tolerance * (100 if name == "dg" else 1)]
        if not all(error < most for error, most in zip(errors, allowed, strict=True)):
            found[name] = errors
    return found


CUTS: list[tuple[int, int, tuple[int, ...] | None]] = [  # tokens, chunk, documents
    (1, 64, None), (37, 16, (5, 1, 20, 11)), (64, 64, None), (64, 16, (32, 32)), (101, 32, None),
    (101, 64, (16, 1, 47, 37)), (300, 64, (100, 7, 193)),
]  # fmt: skip


@pytest.mark.parametrize("mixer", NAMES)
def test_float64_is_exact(mixer: str) -> None:
    for tokens, chunk, lengths in CUTS:
        x = naive_mixers.make_inputs(mixer, 2, tokens, 4, 6, 5)
        found = wrong(x, mixer, chunk, lengths, 5e-15)
        assert not found, (tokens, chunk, lengths)


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mixer", NAMES)
def test_lower_precision(mixer: str, dtype: torch.dtype) -> None:
    x = naive_mixers.make_inputs(mixer, 1, 101, 4, 16, 8, dtype)
    assert not wrong(x, mixer, 64, (16, 1, 47, 37), TOLERANCE[dtype])


@pytest.mark.parametrize("mixer", NAMES)
def test_later_tokens_and_other_documents_change_nothing(mixer: str) -> None:
    lengths, chunk = (40, 60), 16
    x = naive_mixers.make_inputs(mixer, 1, 100, 2, 8, 8)
    options = {"mixer": f"{mixer}:chunk={chunk}", "mask": mask_of(lengths)}
    out, state = cpbench.mix(**x, **options)
    changed = {name: y.clone() for name, y in x.items()}
    for name in TENSORS[:5]:
        if name in x:
            changed[name][:, 55:] *= 0.5
    perturbed, other = cpbench.mix(**changed, **options)
    assert torch.equal(perturbed[:, :55], out[:, :55])
    assert not torch.allclose(perturbed[:, 56:], out[:, 56:])
    assert not torch.allclose(other, state)
    changed = {name: y.clone() for name, y in x.items()}
    for name in TENSORS[:5]:
        if name in x:
            changed[name][:, :40] *= 0.5
    perturbed, other = cpbench.mix(**changed, **options)
    assert torch.equal(perturbed[:, 40:], out[:, 40:])
    assert torch.equal(other, state)


@pytest.mark.parametrize("mixer", NAMES)
def test_the_state_goes_on(mixer: str) -> None:
    """Two calls, the second from the state of the first, are one call."""
    x = naive_mixers.make_inputs(mixer, 1, 96, 2, 8, 8, dtype=torch.float32)
    initial = x.pop("initial_state").float()
    out, state = cpbench.mix(**x, mixer=f"{mixer}:chunk=32", initial_state=initial)
    halves = [{name: y[:, part] for name, y in x.items()} for part in (slice(64), slice(64, None))]
    first, between = cpbench.mix(**halves[0], mixer=f"{mixer}:chunk=32", initial_state=initial)
    second, last = cpbench.mix(**halves[1], mixer=f"{mixer}:chunk=32", initial_state=between)
    assert state.dtype == between.dtype == torch.float32
    torch.testing.assert_close(torch.cat([first, second], 1), out)
    torch.testing.assert_close(last, state)


def test_a_long_sequence_keeps_the_digits_of_its_state() -> None:
    """A state of bfloat16 is off by 0.9 % after 4K tokens; sums of gates over all tokens, more."""
    x = naive_mixers.make_inputs("gated_deltanet", 1, 4096, 2, 16, 16, torch.float32)
    out, state = cpbench.mix(**x, mixer="gated_deltanet")
    exact, exact_state = cpbench.mix(
        **{n: y.double() for n, y in x.items()}, mixer="gated_deltanet"
    )
    assert naive.error(out, exact) < 1e-6
    assert naive.error(state, exact_state) < 1e-6


def test_linear_without_a_mask() -> None:
    x = naive_mixers.make_inputs("linear", 2, 37, 2, 6, 5)
    got, out, state = call(x, "linear", mask="full", scale=SCALE)
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    total = torch.einsum("bshk,bshv->bhkv", leaves["k"], leaves["v"]) + leaves["initial_state"]
    expected = SCALE * torch.einsum("bshk,bhkv->bshv", leaves["q"], total)
    wanted = torch.autograd.grad((expected, total), tuple(leaves.values()), seeds(out, state))
    assert naive.error(out, expected) < 1e-14
    assert naive.error(state, total) < 1e-14
    for name, gradient in zip(leaves, wanted, strict=True):
        assert naive.error(got[name], gradient) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_decays_of_retention(dtype: torch.dtype) -> None:
    x = naive_mixers.make_inputs("retention", 1, 70, 3, 8, 8, dtype)
    x["g"] = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]).double().log().expand(1, 70, 3)
    expected, _ = cpbench.mix(**x, mixer="ssd")
    del x["g"]
    torch.testing.assert_close(cpbench.mix(**x, mixer="retention")[0], expected)


def test_the_default_scale_and_mask() -> None:
    x = naive_mixers.make_inputs("gated_deltanet", 1, 40, 2, 16, 8)
    out, _ = cpbench.mix(**x)
    expected, _ = cpbench.mix(
        **x, mixer="gated_deltanet", mask=masks.build("causal", 40), scale=0.25
    )
    assert torch.equal(out, expected)
    assert torch.equal(cpbench.mix(**x, mask="causal")[0], expected)


@pytest.mark.parametrize("mixer", NAMES)
def test_tokens_that_are_not_finite_reach_what_depends_on_them(mixer: str) -> None:
    x = naive_mixers.make_inputs(mixer, 1, 30, 2, 4, 4)
    expected, _, _ = naive_mixers.gradients(
        x, mixer, 0.5, torch.ones(1, 30, 2, 4), torch.zeros(1, 2, 4, 4), (0, 20), 8
    )
    x["v"][0, 10, 1, 2] = math.nan
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    out, state = cpbench.mix(**leaves, mixer=f"{mixer}:chunk=8", mask=mask_of((20, 10)), scale=0.5)
    clean, true_state = naive_mixers.recurrence(x, mixer, 0.5, (0, 20), 8)
    torch.testing.assert_close(out, clean, equal_nan=True)
    torch.testing.assert_close(state, true_state, equal_nan=True)
    assert out.isnan().any()
    assert not out[:, :10].isnan().any()
    assert not out[:, 20:].isnan().any()
    (dv,) = torch.autograd.grad(out.sum(), leaves["v"])
    torch.testing.assert_close(dv, expected["v"])


def test_a_gate_of_minus_infinity_forgets() -> None:
    x = naive_mixers.make_inputs("ssd", 1, 30, 2, 4, 4)
    x["g"][:, 12] = -math.inf
    out, state = cpbench.mix(**x, mixer="ssd")
    expected, true_state = cpbench.mix(**x, mixer="ssd", mask=mask_of((12, 18)))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, true_state)


def test_gates_and_betas_of_any_dtype() -> None:
    x = naive_mixers.make_inputs("gated_deltanet", 1, 70, 2, 8, 8, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float64):
        given = {name: x[name].to(dtype) for name in ("g", "beta", "initial_state")}
        expected, *_ = call(x | {name: y.float() for name, y in given.items()}, "gated_deltanet")
        got, out, state = call(x | given, "gated_deltanet")
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        for name, gradient in got.items():
            assert gradient.dtype == (x | given)[name].dtype
            torch.testing.assert_close(gradient, expected[name].to(gradient.dtype))


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet"])
def test_autocast_casts_q_k_and_v(mixer: str) -> None:
    x = naive_mixers.make_inputs(mixer, 1, 70, 2, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = cpbench.mix(**x, mixer=mixer)
    cast = x | {name: x[name].bfloat16() for name in "qkv"}
    expected, expected_state = cpbench.mix(**cast, mixer=mixer)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert torch.equal(state, expected_state)


def test_in_pytorch() -> None:
    x = naive_mixers.make_inputs("kda", 1, 50, 2, 8, 4, dtype=torch.float32)
    leaves = {name: y.requires_grad_() for name, y in x.items()}
    out, _ = cpbench.mix(**leaves, mixer="kda")
    tensors = tuple(leaves.values())
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), tensors)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), tensors)

    def run(*given: torch.Tensor) -> torch.Tensor:
        return cpbench.mix(**dict(zip(leaves, given, strict=True)), mixer="kda")[0]

    kept = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False).sum(), tensors)
    for a, b in zip(first, kept, strict=True):
        assert torch.equal(a, b)
    (dq,) = torch.autograd.grad(run(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()
    out = run(*tensors)
    with torch.no_grad():
        leaves["k"].mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()
    with torch.inference_mode():
        assert run(*(y.clone() for y in tensors)).is_inference()


def test_any_strides() -> None:
    x = naive_mixers.make_inputs("gated_deltanet", 2, 50, 2, 8, 4, dtype=torch.float32)
    expected, _, _ = call(x, "gated_deltanet")
    strided = {name: torch.stack([y, y], -1)[..., 0] for name, y in x.items()}
    strided["q"] = x["q"].transpose(1, 2).contiguous().transpose(1, 2)
    got, _, _ = call(strided, "gated_deltanet")
    for name in x:
        assert torch.equal(got[name], expected[name])


def shaped(**changes: Any) -> dict[str, Any]:
    x = naive_mixers.make_inputs("gated_deltanet", 1, 8, 2, 4, 3, dtype=torch.float32)
    return x | {"mixer": "gated_deltanet"} | changes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"mixer": "mamba"}, "no mixer 'mamba'; there are: linear, retention, ssd, gla"),
    "atlas": ({"mixer": "atlas"}, "atlas is not a mixer: its memory is an MLP trained with Muon"),
    "titans": ({"mixer": "titans"}, "not affine in the state"),
    "mela": ({"mixer": "mela"}, "not affine in the state"),
    "lact": ({"mixer": "lact"}, "not affine in the state"),
    "chunk": ({"mixer": "gla:chunk=24"}, "chunk = 24 must be a power of two"),
    "chunk 0": ({"mixer": "gla:chunk=0"}, "must be an integer from 1 to 65536"),
    "parameter": ({"mixer": "gla:size=2"}, "has no parameter 'size'; it takes chunk, kernel"),
    "kernel": ({"mixer": "ssd:kernel=cuda"}, "kernel = 'cuda' is not one of torch, triton"),
    "diagonal": (
        {"mixer": "kda:kernel=triton", "g": torch.zeros(1, 8, 2, 4)},
        "kda: kernel=triton computes at most one decay per head and token, not kda",
    ),
    "long": (
        {"mixer": "gated_deltanet:kernel=triton,chunk=128"}, "a chunk of 16, 32, 64, not 128",
    ),
    "no g": ({"g": None}, "gated_deltanet needs g, of shape [1, 8, 2]"),
    "g of kda": ({"g": torch.zeros(1, 8, 2, 4)}, "g has shape [1, 8, 2, 4]; shapes are [1, 8, 2]"),
    "g of ssd": ({"g": torch.zeros(1, 7, 2)}, "g is torch.float32 [1, 7, 2]; gated_deltanet wants"),
    "integer g": ({"g": torch.zeros(1, 8, 2).int()}, "wants floating point [1, 8, 2]"),
    "no beta": ({"beta": None}, "gated_deltanet needs beta, of shape [1, 8, 2]"),
    "g of linear": ({"mixer": "linear"}, "linear takes no g; retention, ssd, gla, gated_deltanet"),
    "beta of ssd": ({"mixer": "ssd"}, "ssd takes no beta; deltanet, gated_deltanet, kda do"),
    "state": ({"initial_state": torch.zeros(1, 2, 3, 4)}, "wants floating point [1, 2, 4, 3]"),
    "heads": ({"v": torch.zeros(1, 8, 4, 3)}, "do not fit; shapes are [B, S, H, K]"),
    "dtype": ({"v": torch.zeros(1, 8, 2, 3).double()}, "must share one dtype"),
    "list": ({"q": [1.0]}, "q must be a torch.Tensor, not [1.0]"),
    "axes": ({"q": torch.zeros(8, 2, 4)}, "q has shape [8, 2, 4]; shapes are [B, S, H, K]"),
    "scale": ({"scale": math.nan}, "scale must be a finite number or None, not nan"),
    "full": ({"mask": "full"}, "gated_deltanet takes the masks causal, causal_document, not <"),
    "window": ({"mask": "sliding_window_causal:window=4"}, "takes the masks causal, causal_doc"),
    "length": ({"mask": masks.build("causal", 9)}, "9 queries and 9 keys does not fit 8 tokens"),
    "mask": ({"mask": torch.ones(8, 8)}, "mask must be a name or one of cpbench.masks, not tensor"),
    "mask name": ({"mask": "casual"}, "casual"),
    "no tokens": (
        {n: torch.zeros(1, 0, 2, 4) for n in "qkv"}, "must have no axis of 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_is_wrong(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError) as caught:
        cpbench.mix(**shaped(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_documents_of_one_token_and_masks_from_lengths() -> None:
    x = naive_mixers.make_inputs("gated_deltanet", 1, 9, 2, 4, 3)
    expected, _ = cpbench.mix(**x, mask=mask_of((1, 1, 4, 3)))
    packed = masks.from_cu_seqlens([0, 1, 2, 6, 9])
    assert torch.equal(cpbench.mix(**x, mask=packed)[0], expected)
    torch.testing.assert_close(
        expected[:, 1],
        0.5 * x["beta"][:, 1, :, None] * (x["q"][:, 1] * x["k"][:, 1]).sum(-1, True) * x["v"][:, 1],
    )
