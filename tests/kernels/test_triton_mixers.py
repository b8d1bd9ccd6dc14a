"""The Triton kernels of the mixers, under Triton's interpreter and compiled ahead of time."""

from __future__ import annotations

import naive
import naive_mixers
import pytest
import torch

import cpbench
from cpbench import masks
from cpbench.kernels.mixers import backward, forward
from cpbench.kernels.mixers.chunks import Inputs, Plan
from cpbench.kernels.mixers.forms import FORMS
from cpbench.kernels.mixers.triton import launch
from cpbench.tools.compiler import compilation

pytest.importorskip("triton")

# Several chunks, the last one shorter, dimensions that are no powers of two, and documents that
# begin with a chunk, inside it, and after a single token.
CASES: list[tuple[str, torch.dtype, int, int, tuple[int, ...]]] = [
    ("linear", torch.float32, 70, 32, (5, 32, 33)),
    ("ssd", torch.float32, 70, 32, ()),
    ("ssd", torch.bfloat16, 70, 16, (5, 32, 33)),
    ("deltanet", torch.float16, 70, 32, (5, 32, 33)),
    ("gated_deltanet", torch.float32, 130, 64, (5, 64, 65, 100)),
    ("gated_deltanet", torch.bfloat16, 70, 32, ()),
]
KEY_DIM = launch.MOST_KEY_COLUMNS + 12  # two parts, the second one smaller


@pytest.mark.parametrize(("mixer", "dtype", "tokens", "chunk", "resets"), CASES)
def test_kernels_compute_what_torch_does(
    mixer: str, dtype: torch.dtype, tokens: int, chunk: int, resets: tuple[int, ...]
) -> None:
    named = naive_mixers.make_inputs(mixer, 1, tokens, 2, KEY_DIM, 24, dtype)
    x = Inputs(*(named.get(name) for name in ("q", "k", "v", "g", "beta")))  # type: ignore[arg-type]
    plan = Plan(FORMS[mixer], 0.4, chunk, resets)
    out, state, saved = launch.output(x, plan, named["initial_state"])
    expected, true_state, true = forward.output(x, plan, named["initial_state"])
    assert true is not None
    assert out.dtype == dtype
    assert naive.error(out, expected) < (1e-6 if dtype == torch.float32 else 2e-4)
    assert naive.error(state, true_state) < 1e-6
    assert naive.error(saved.states, true.states) < 1e-6
    if true.inverse is not None:
        assert saved.inverse is not None
        assert naive.error(saved.inverse, true.inverse) < 1e-6
    dout, dstate = torch.randn(out.shape).to(out), torch.randn_like(state)
    found = launch.backward(x, plan, saved, dout, dstate)
    wanted = backward.backward(x, plan, true, dout, dstate)
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            # The last head has gates of 1,280 nats a chunk: their sums have fewer digits.
            errors = naive_mixers.head_errors(a, b, 1 if name == "state" else 2)
            assert max(errors[:-1]) < (2e-6 if a.dtype == torch.float32 else 2e-4), name
            assert errors[-1] < 1e-3, name


@pytest.mark.parametrize("mixer", ["ssd", "gated_deltanet"])
def test_products_in_parts_as_on_a_gpu(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds nothing to TF32: no digit of either part is lost."""
    made = launch._constants
    monkeypatch.setattr(launch, "_constants", lambda *sizes, cuda: made(*sizes, cuda=True))
    test_kernels_compute_what_torch_does(mixer, torch.bfloat16, 40, 16, (5,))


def test_gradients_follow_the_kernels() -> None:
    x = naive_mixers.make_inputs("gated_deltanet", 1, 50, 2, 16, 8, torch.float32)
    mask = masks.build("causal_document", 50, doc_lens=[20, 30])
    found = {}
    for kernel in ("torch", "triton"):
        leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
        mixer = f"gated_deltanet:kernel={kernel},chunk=32"
        out, state = cpbench.mix(**leaves, mixer=mixer, mask=mask)
        found[kernel] = torch.autograd.grad(out.sum() + state.sum(), tuple(leaves.values()))
    for a, b in zip(*found.values(), strict=True):
        assert naive.error(a, b) < 1e-5


def test_a_sequence_shorter_than_a_matrix_product() -> None:
    x = naive_mixers.make_inputs("ssd", 1, 5, 2, 16, 8, torch.float32)
    out, _ = cpbench.mix(**x, mixer="ssd:kernel=triton")
    assert torch.equal(out, cpbench.mix(**x, mixer="ssd:chunk=32")[0])


def test_without_the_interpreter_a_cpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    x = naive_mixers.make_inputs("ssd", 1, 20, 2, 16, 8, torch.float32)
    with pytest.raises(cpbench.Unsupported, match="set TRITON_INTERPRET=1"):
        cpbench.mix(**x, mixer="ssd:kernel=triton")


def test_kernels_compile() -> None:
    """Small heads, which compile in seconds; docs/mixers.md has those of 64 and 128."""
    requests = compilation.compile_requests(["mixers"], ["cuda:90"], ["bfloat16"], [16], {})
    rows = compilation.compile_kernels(requests)
    names = [f"gated_deltanet.{name}" for name in launch.KERNELS]
    names += [f"ssd.{name}" for name in launch.KERNELS if name not in launch.OF_DELTA]
    assert [row["kernel"] for row in rows] == names
    assert all(map(compilation.compiles_well, rows))
