"""What the public functions take, and what they say of anything else."""

from __future__ import annotations

import math
from typing import Any

import naive
import pytest
import torch

import cpbench
from cpbench import masks
from cpbench.core import registry

MASK = masks.build("causal", 16)
ON_CPU = ["bands", "flex", "reference", "sdpa.cpu_flash", "sdpa.math"]


def qkv(tokens: int = 16, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> list[torch.Tensor]:
    return naive.random_inputs(1, tokens, heads, kv_heads, dim, torch.float32)[:3]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "scale nan": ({"scale": math.nan}, "scale must be a finite number or None, not nan"),
    "scale inf": ({"scale": math.inf}, "scale must be a finite number or None, not inf"),
    "scale text": ({"scale": "1"}, "scale must be a finite number or None, not '1'"),
    "scale huge": ({"scale": 10**400}, "scale must be a finite number or None, not 1000"),
    "sparse": ({n: torch.zeros(1, 16, 2, 16).to_sparse() for n in "qkv"}, "must be a dense tensor"),
    "meta": ({n: torch.zeros(1, 16, 2, 16, device="meta") for n in "qkv"}, "on cpu or cuda, not"),
    "mask text": ({"mask": "causal"}, "mask must be one of cpbench.masks, such as cpbench.masks"),
    "mask tensor": ({"mask": torch.ones(2, 2)}, "mask must be one of cpbench.masks"),
    "no heads": ({"k": torch.zeros(1, 16, 0, 16), "v": torch.zeros(1, 16, 0, 16)}, "a multiple of"),
    "head_dim 0": ({n: torch.zeros(1, 16, 2, 0) for n in "qkv"}, "a head_dim of at least 1"),
    "list": ({"q": [[1.0]]}, "q must be a torch.Tensor, not [[1.0]]"),
    "axes": ({"v": torch.zeros(16, 2, 16)}, "v has shape [16, 2, 16]; shapes are [B, S, H, D]"),
    "dtype": ({"k": torch.zeros(1, 16, 2, 16).double()}, "must share one dtype"),
    "integers": (
        {n: torch.zeros(1, 16, 2, 16, dtype=torch.int32) for n in "qkv"},
        "must be float64, float32, bfloat16, float16, not int32",
    ),
    "device": ({"k": torch.zeros(1, 16, 2, 16, device="meta")}, "q is on cpu and k on meta"),
    "length": ({"mask": masks.build("causal", 8)}, "do not fit a mask of 8 queries and 8 keys"),
    "operator": ({"operator": "band"}, "no operator 'band'"),
    "parameter": ({"operator": "bands:speed=3"}, "has no parameter 'speed'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_line_says_what_is_wrong(name: str) -> None:
    changes, message = WRONG[name]
    arguments: dict[str, Any] = dict(zip("qkv", qkv(), strict=True)) | {"mask": MASK} | changes
    with pytest.raises(ValueError) as caught:
        cpbench.attention(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("operator", ON_CPU)
def test_any_strides(operator: str) -> None:
    q, k, v = (x.requires_grad_(operator != "flex") for x in qkv(dim=32))
    expected, _ = cpbench.attention(q, k, v, MASK, operator=operator)
    layouts = (
        lambda x: torch.stack([x, x], dim=-1)[..., 0],  # strided head_dim
        lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    )
    for layout in layouts:
        out, _ = cpbench.attention(layout(q), layout(k), layout(v), MASK, operator=operator)
        torch.testing.assert_close(out, expected)
        if operator != "flex":
            for actual, wanted in zip(
                torch.autograd.grad(out.square().sum(), (q, k, v)),
                torch.autograd.grad(expected.square().sum(), (q, k, v), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("operator", ON_CPU)
def test_no_grad_with_inputs_that_want_gradients(operator: str) -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    with torch.no_grad():
        out, _ = cpbench.attention(*inputs, MASK, operator=operator)
    assert not out.requires_grad
    torch.testing.assert_close(out, cpbench.attention(*inputs, MASK)[0])


def test_an_operator_without_a_backward_says_so() -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    with pytest.raises(cpbench.Unsupported, match="flex has no backward pass on cpu"):
        cpbench.attention(*inputs, MASK, operator="flex")


def test_every_operator_for_cpus_is_tested_here() -> None:
    takes_masks = {
        info.name
        for info in registry.operators().values()
        if "cpu" in info.devices
        and not (info.selects or info.mixer or info.paged or info.interpreted_on)
        and "causal" in info.masks
    }
    assert takes_masks == set(ON_CPU)


def test_an_empty_mask_has_zero_gradients() -> None:
    empty = masks.AttnMask.from_slices(16, 16, [])
    for operator in ("bands", "reference", "sdpa.cpu_flash", "sdpa.math"):
        inputs = [x.requires_grad_() for x in qkv()]
        out, _ = cpbench.attention(*inputs, empty, operator=operator)
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert not out.any()
        assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -1, 2])
@pytest.mark.parametrize("operator", ["bands", "reference", "sdpa.cpu_flash", "sdpa.math"])
def test_any_finite_scale(operator: str, scale: float) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(kv_heads=4))
    out, _ = cpbench.attention(q, k, v, MASK, operator=operator, scale=scale)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    scores = scores.masked_fill(~torch.as_tensor(MASK.to_dense()), -torch.inf)
    expected = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_autocast_casts_no_integers() -> None:
    with torch.autocast("cpu"), pytest.raises(ValueError, match="must be float64"):
        cpbench.attention(*(x.int() for x in qkv()), MASK)
