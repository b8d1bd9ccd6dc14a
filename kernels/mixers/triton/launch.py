"""Launches of the Triton kernels of mixers: :func:`output` and :func:`backward` are in the place of
those of ``cpbench.kernels.mixers.forward`` and ``backward``.

Legend: B batch, S tokens, H heads, K and V dimensions of keys and values, C tokens of a chunk.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from cpbench.core.environment import interpreting
from cpbench.core.kernel_launch import Launch
from cpbench.kernels.mixers.backward import Gradients
from cpbench.kernels.mixers.chunks import Inputs, Plan, Slab, write
from cpbench.kernels.mixers.forward import Saved, initial_state
from cpbench.kernels.triton.interpreter import patch_interpreter

if TYPE_CHECKING:
    import torch

MOST_COLUMNS = 16  # of the values of a program; more spill registers
MOST_KEY_COLUMNS = 16  # of the gradients of a program; more spill registers
WARPS = 8
LARGEST_KEY = 128
CHUNKS = (16, 32, 64)
DTYPES = ("bfloat16", "float16", "float32")
FLOAT32 = ("Inverse", "State", "States", "X", "G", "Beta", "DState", "DStates", "DV", "DG", "DBeta")
ALIGNED = ("q", "k", "v", "o", "do", "dq", "dk")  # prefixes of strides, of heads of 16 elements
OF_DELTA = ("invert", "recompute_values")  # under the delta rule alone
KERNELS = (
    "invert", "pass_states", "outputs", "pass_gradients", "recompute_values", "chunk_gradients"
)  # fmt: skip


def refusal(plan: Plan, key_dim: int, dtype: str, device: str) -> str | None:
    """Why the kernels cannot compute this, or None if they can."""
    form = plan.form
    if importlib.util.find_spec("triton") is None:
        return "kernel=triton needs the Python package triton: pip install 'cpbench[triton]'"
    if device == "cpu" and not interpreting():
        return (
            "kernel=triton has no compiler for cpu; set TRITON_INTERPRET=1 to check it there under "
            "Triton's interpreter (slow)"
        )
    if form.gate == "diagonal" or form.lagging:
        return f"kernel=triton computes at most one decay per head and token, not {form.name}"
    if plan.chunk not in CHUNKS:
        return f"kernel=triton takes a chunk of {', '.join(map(str, CHUNKS))}, not {plan.chunk}"
    if key_dim > LARGEST_KEY:
        return f"kernel=triton takes keys of up to {LARGEST_KEY} dimensions, not {key_dim}"
    return None if dtype in DTYPES else f"kernel=triton takes {', '.join(DTYPES)}, not {dtype}"


def output(
    x: Inputs, plan: Plan, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Saved]:
    """As ``cpbench.kernels.mixers.forward.output``, which see."""
    import torch

    device = torch.cuda.device(x.q.device) if x.q.is_cuda else nullcontext()
    with device:
        return _output(x.map(_readable), plan, state)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """A copy if the last axis of a matrix is strided."""
    return x if x.ndim < 4 or x.stride(3) == 1 else x.contiguous()


def _output(
    x: Inputs, plan: Plan, state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, Saved]:
    q, k, v, g, beta, _ = x
    (B, S, H, K), V, C = q.shape, v.shape[3], plan.tokens_per_chunk(q.shape[1])
    chunks, h = -(-S // C), B * H
    first = initial_state(x, state).contiguous()
    states = first.new_empty((chunks + 1, h, K, V))
    out = v.new_empty(v.shape)
    number = _document_numbers(plan, chunks * C, q)
    gates, betas = (q if y is None else y for y in (g, beta))  # never read if there are none
    constants = _constants(plan, C, K, V, q.element_size() == 2, cuda=q.is_cuda)
    columns = -(-V // constants["E"])
    kernels = device_modules()[0]
    inverse, values = None, first  # never read without the delta rule
    if plan.form.delta:
        inverse = first.new_empty((chunks, h, C, C))
        values = first.new_empty((chunks, h, C, V))
        kernels.invert[(chunks, h)](
            k, gates, betas, number, inverse, *_strides(k, gates, betas), h, H, S,
            **_of(kernels.invert, constants),
        )  # fmt: skip
    kernels.pass_states[(h, columns)](
        k, v, gates, betas, number, first if inverse is None else inverse, first, states, values,
        *_strides(k, v, gates, betas), h, H, S, chunks, **_of(kernels.pass_states, constants),
    )  # fmt: skip
    kernels.outputs[(chunks, h, columns)](
        q, k, v, gates, betas, number, states, values, out,
        *_strides(q, k, v, gates, betas, out), h, H, S, plan.scale,
        **_of(kernels.outputs, constants),
    )  # fmt: skip
    return out, states[-1].unflatten(0, (B, H)), Saved(states[:-1], inverse)


def backward(
    x: Inputs, plan: Plan, saved: Saved, dout: torch.Tensor, dstate: torch.Tensor | None
) -> Gradients:
    """As ``cpbench.kernels.mixers.backward.backward``, which see."""
    import torch

    device = torch.cuda.device(x.q.device) if x.q.is_cuda else nullcontext()
    with device:
        inputs = x.map(_readable)
        return _backward(inputs, plan, saved, dout.contiguous(), dstate)


def _backward(
    x: Inputs, plan: Plan, saved: Saved, dout: torch.Tensor, dstate: torch.Tensor | None
) -> Gradients:
    q, k, v, g, beta, _ = x
    (B, S, H, K), V, C = q.shape, v.shape[3], plan.tokens_per_chunk(q.shape[1])
    chunks, h = -(-S // C), B * H
    last = initial_state(x, dstate).contiguous()
    dstates = last.new_empty((chunks + 1, h, K, V))
    dvalues = last.new_empty((chunks, h, C, V))
    dq, dk, dv = (y.new_empty(y.shape) for y in (q, k, v))
    constants = _constants(plan, C, K, V, q.element_size() == 2, cuda=q.is_cuda)
    columns, parts = -(-V // constants["E"]), -(-K // constants["P"])
    of_parts = [None if y is None else last.new_empty((parts, *y.shape)) for y in (g, beta)]
    number = _document_numbers(plan, chunks * C, q)
    inverse = last if saved.inverse is None else saved.inverse  # never read if there is none
    gates, betas = (q if y is None else y for y in (g, beta))
    dgates, dbetas = (q if y is None else y[0] for y in of_parts)
    kernels = device_modules()[1]
    kernels.pass_gradients[(h, columns)](
        q, k, gates, betas, number, inverse, dout, last, dstates, dvalues,
        *_strides(q, k, gates, betas, dout), h, H, S, chunks, plan.scale,
        **_of(kernels.pass_gradients, constants),
    )  # fmt: skip
    values = last
    if plan.form.delta:
        values = last.new_empty((chunks, h, C, V))
        kernels.recompute_values[(chunks, h, columns)](
            k, v, gates, number, inverse, saved.states, values, *_strides(k, v, gates), h, H, S,
            **_of(kernels.recompute_values, constants),
        )  # fmt: skip
    kernels.chunk_gradients[(chunks, h, parts)](
        q, k, v, gates, betas, number, values, saved.states, dstates, dvalues, dout,
        dq, dk, dgates, dbetas,
        *_strides(q, k, v, gates, betas, dout, dq, dk, dgates, dbetas), h, H, S, columns,
        plan.scale,
        **_of(kernels.chunk_gradients, constants),
    )  # fmt: skip
    dg, dbeta = (
        None if y is None or like is None else y.sum(0).to(like.dtype)
        for y, like in zip(of_parts, (g, beta), strict=True)
    )
    write(dvalues, Slab(0, chunks, 0, S), dv)
    return Gradients(dq, dk, dv, dg, dbeta, dstates[0].unflatten(0, (B, H)))


def device_modules() -> tuple[Any, Any]:
    """The modules with the kernels of the forward and the backward pass."""
    if interpreting():
        patch_interpreter()
    from cpbench.kernels.mixers.triton import backward_device, forward_device

    return forward_device, backward_device


def _document_numbers(plan: Plan, tokens: int, q: torch.Tensor) -> torch.Tensor:
    """The number of the document of each token, after that of the token before the first, int32."""
    import torch

    if not plan.resets:
        return torch.zeros(1, dtype=torch.int32, device=q.device)
    index = torch.arange(tokens).clamp_(max=q.shape[1] - 1)
    number = torch.bucketize(index, torch.tensor(plan.resets), right=True)
    return torch.nn.functional.pad(number, (1, 0)).int().to(q.device)


def _constants(plan: Plan, C: int, K: int, V: int, exact: bool, *, cuda: bool) -> dict[str, Any]:
    """The compile-time constants of all kernels, and the launch options.

    Args:
        exact: whether products of the inputs are exact in TF32, as those of 16 bits are.
    """
    folds = "tf32x3" if cuda else "ieee"
    return {
        "C": C, "D": _padded(K), "E": min(_padded(V), MOST_COLUMNS),
        "P": min(_padded(K), MOST_KEY_COLUMNS), "KEY_DIM": K, "VALUE_DIM": V,
        "GATED": plan.form.gate is not None, "DELTA": plan.form.delta,
        "DOCUMENTS": bool(plan.resets), "EXACT": "tf32" if exact and cuda else folds,
        "PRECISION": folds,
    }  # fmt: skip


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _of(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """The constants that a kernel has, and its launch options."""
    own = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return own | {"num_warps": WARPS, "num_stages": 1}


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of batch, token and head of each tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def launches(
    target: str, dtype: str, head_dim: int, head_dim_v: int = 0, **config: int
) -> list[Launch]:
    """The launches of a forward and a backward pass of ``gated_deltanet`` over documents, and of
    ``ssd``, to compile them ahead of time.

    Raises:
        ValueError: for fields of a configuration, of which the kernels have none.
    """
    from cpbench.kernels.mixers.forms import FORMS, TRITON_CHUNK

    if config:
        raise ValueError(f"mixers have no configuration, and {', '.join(config)} was given")
    element = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    found = []
    for form in ("gated_deltanet", "ssd"):
        plan = Plan(FORMS[form], 1.0, TRITON_CHUNK, (1,) if FORMS[form].delta else ())
        constants = _constants(
            plan, TRITON_CHUNK, head_dim, head_dim_v or head_dim, dtype != "float32",
            cuda=target.startswith("cuda"),
        )  # fmt: skip
        for name in KERNELS:
            if name in OF_DELTA and not plan.form.delta:
                continue
            module = next(one for one in device_modules() if hasattr(one, name))
            arguments = getattr(module, name).arg_names
            own = {key: value for key, value in constants.items() if key in arguments}
            types = {}
            for argument in arguments:
                if argument == "Number":
                    types[argument] = "*i32"
                elif argument in FLOAT32:
                    types[argument] = "*fp32"
                elif argument[0].isupper() and argument not in own:
                    types[argument] = f"*{element}"
                elif argument not in own:
                    types[argument] = "fp32" if argument == "scale" else "i32"
            strides = [x for x in types if x.rpartition("_")[0] in ALIGNED]
            pointers = [x for x, type_ in types.items() if type_[0] == "*"]
            found.append(
                Launch(
                    f"{form}.{name}", f"{module.__name__}:{name}", types, own,
                    (*pointers, *strides), WARPS, 1, f"chunk {TRITON_CHUNK} w{WARPS}",
                )
            )  # fmt: skip
    return found
