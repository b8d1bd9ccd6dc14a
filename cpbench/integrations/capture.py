"""q, k and v of a model's attention layers, for ``inputs = "file:…"`` of a sweep.

Models of transformers are run with the attention of :mod:`cpbench.integrations.transformers`, which
sees keys and values before they are repeated for GQA.  Of other modules, calls of
``scaled_dot_product_attention`` are seen while one of the named modules runs.

``python -m cpbench.integrations.capture``: reads a request as JSON from stdin and prints one JSON
row per file; see ``cpbench capture``.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from cpbench.core.problem import different_or_zero
from cpbench.core.user_files import ROTATED
from cpbench.results.store import write_atomically

if TYPE_CHECKING:
    from types import TracebackType

    from cpbench.integrations import transformers


@dataclass(frozen=True)
class Captured:
    """q, k and v of a call, each ``[B, S, heads, D]``.

    Scores of a sweep are scaled by head_dim ** -0.5.  Where a layer has another scale, q is
    multiplied by the quotient, in float32 unless that is exact.

    Attributes:
        factor: by which q was multiplied.
        rotated: whether q and k have the model's RoPE.
        window: see :class:`cpbench.integrations.transformers.Call`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    factor: float = 1.0
    window: int | None = None
    rotated: bool = True

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
        window: int | None = None, rotated: bool = True,
    ) -> Captured:  # fmt: skip
        factor = 1.0 if scale is None else scale * math.sqrt(q.shape[-1])
        if math.isclose(factor, 1.0, rel_tol=1e-6):
            factor = 1.0
        exact = math.frexp(factor)[0] == 0.5  # a power of two
        scaled = q.detach() if exact else q.detach().float()
        q, k, v = (x.detach().cpu() for x in (scaled * factor, k, v))
        return cls(q, k, v, factor, window, rotated)


class Capture(TorchFunctionMode):
    """Inside, the q, k and v of ``scaled_dot_product_attention`` are kept, of the last call in each
    module, that of a module inside it included.

    Args:
        model: the module that runs.
        names: of its attention modules, as in ``model.named_modules()``.

    Attributes:
        found: by name of the module.

    Raises:
        ValueError: for a name that is no module of the model.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                raise ValueError(f"the model has no module {name!r}; {_suggest(name, modules)}")
        self.found: dict[str, Captured] = {}
        self._modules = {name: modules[name] for name in names}
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Capture:
        for name, module in self._modules.items():
            begin = partial(self._begin, name)
            self._hooks.append(module.register_forward_pre_hook(begin))
            self._hooks.append(module.register_forward_hook(self._end))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and self._running:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            q, k, v = (given[name].transpose(1, 2) for name in ("query", "key", "value"))
            captured = Captured.of(q, k, v, given.get("scale"))
            self.found |= dict.fromkeys(self._running, captured)
        return func(*args, **kwargs)


def capture_modules(
    model: torch.nn.Module, names: Sequence[str], *inputs: Any, **options: Any
) -> dict[str, Captured]:
    """Run ``model(*inputs, **options)`` and return q, k and v of its attention modules, by name.

    Raises:
        ValueError: for a name that is no module, or of one that does not call
            ``scaled_dot_product_attention``.
    """
    with Capture(model, names) as capture, torch.no_grad():
        model(*inputs, **options)
    for name in names:
        if name not in capture.found:
            raise ValueError(f"module {name!r} did not call scaled_dot_product_attention")
    return capture.found


def capture_layers(
    model: Any, layers: Sequence[int], tokens: torch.Tensor, before_rope: bool = False
) -> dict[int, Captured]:
    """Run a model of transformers and return q, k and v of some layers, by number.

    Args:
        tokens: ``[B, S]`` token ids.
        before_rope: whether q and k are those that the layer rotates, not those that it then
            attends with.

    Raises:
        ValueError: for a layer that the model does not have, or one whose queries and keys before
            RoPE cannot be seen.
    """
    from cpbench.integrations import transformers

    transformers.register(name="cpbench_capture")
    model.set_attn_implementation("cpbench_capture")
    found: dict[int, Captured] = {}
    seen: set[int] = set()
    rotated: list[tuple[torch.Tensor, torch.Tensor]] = []  # by the layer that runs

    def keep(call: transformers.Call) -> None:
        layer = int(getattr(call.module, "layer_idx", len(seen)))
        seen.add(layer)
        if layer in layers:
            q, k = _unrotated(rotated, call, layer) if before_rope else (call.q, call.k)
            found[layer] = Captured.of(q, k, call.v, call.scale, call.window, not before_rope)
        rotated.clear()

    with transformers.observed(keep), _observed_rope(model, rotated), torch.no_grad():
        model(tokens)
    for layer in layers:
        if layer not in found:
            raise ValueError(f"the model has no layer {layer}; it has {_ranges(seen)}")
    return found


@contextmanager
def _observed_rope(model: Any, rotated: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Inside, the arguments of ``apply_rotary_pos_emb``, which models of transformers have beside
    their classes, are appended to ``rotated``: queries and keys ``[B, heads, S, D]``."""
    name = "apply_rotary_pos_emb"
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    originals = {home: getattr(home, name) for home in homes if hasattr(home, name)}

    def observed(rotate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(rotate)
        def call(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rotated.append((q, k))
            return rotate(q, k, *args, **kwargs)

        return call

    try:
        for home, rotate in originals.items():
            setattr(home, name, observed(rotate))
        yield
    finally:
        for home, rotate in originals.items():
            setattr(home, name, rotate)


def _unrotated(
    rotated: list[tuple[torch.Tensor, torch.Tensor]], call: transformers.Call, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of a call ``[B, S, heads, D]`` before RoPE; see :func:`_observed_rope`."""
    for pair in rotated:
        q, k = (x.transpose(1, 2) for x in pair)
        if q.shape == call.q.shape and k.shape == call.k.shape:
            return q, k
    raise ValueError(
        f"layer {layer} does not rotate whole queries and keys by apply_rotary_pos_emb: what they "
        "are before RoPE cannot be seen"
    )


def save(tensors: Captured, path: Path) -> None:
    """Write q, k and v to a safetensors file, and whether q and k are rotated."""
    from safetensors.torch import save as serialised

    by_name = {"q": tensors.q, "k": tensors.k, "v": tensors.v}
    mark = {ROTATED: "true" if tensors.rotated else "false"}
    contiguous = {name: x.contiguous() for name, x in by_name.items()}
    write_atomically(path, serialised(contiguous, mark))


def _suggest(name: str, modules: dict[str, torch.nn.Module]) -> str:
    like = [other for other in modules if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"there are: {', '.join((like or [n for n in modules if n])[:12])}"


def _ranges(layers: set[int]) -> str:
    return f"layers 0 to {max(layers)}" if layers else "no attention that could be seen"


# --- the command ------------------------------------------------------------------------------


def _load(model: str) -> Any:
    """A model of transformers from a folder, or what ``module:function`` returns."""
    module, _, function = model.partition(":")
    if Path(model).is_dir():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model, local_files_only=True).eval()  # type: ignore[no-untyped-call]
    if not function:
        raise ValueError(f"--model {model!r} is neither a folder nor module:function")
    sys.path.append("")  # last, so that no folder there hides a package
    try:
        make: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model {model}: {error}") from None
    if not callable(make):
        raise ValueError(f"--model {model} is no function")
    made = make()
    if not isinstance(made, torch.nn.Module):
        raise ValueError(f"--model {model} returned {type(made).__name__}, not a torch.nn.Module")
    return made.eval()


def _tokens(model: str, prompt: Path) -> torch.Tensor:
    """Token ids of a text, by the tokenizer of the model; or the list of a .json file."""
    if prompt.suffix == ".json":
        try:
            listed = json.loads(prompt.read_text("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"--prompt {prompt} is not JSON: {error}") from None
        if not isinstance(listed, list) or not listed or any(type(x) is not int for x in listed):
            raise ValueError(f"--prompt {prompt} must hold one JSON list of token ids")
        return torch.tensor([listed])
    if not Path(model).is_dir():
        raise ValueError("a text needs the tokenizer of a model folder: give token ids as .json")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # it raises many types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{model} has no tokenizer: give token ids as .json ({reason})") from None
    ids: torch.Tensor = tokenizer(prompt.read_text("utf-8-sig"), return_tensors="pt").input_ids
    if not ids.numel():
        raise ValueError(f"--prompt {prompt} holds no tokens")
    return ids


def _check_vocabulary(model: Any, tokens: torch.Tensor, prompt: str) -> None:
    """Raise ``ValueError`` for a token id that a model of transformers does not know."""
    if not hasattr(model, "get_input_embeddings"):
        return
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    unknown = tokens[(tokens < 0) | (tokens >= size)] if size else tokens[:0]
    if unknown.numel():
        raise ValueError(
            f"--prompt {prompt}: token id {int(unknown[0])} is not in the vocabulary of the model, "
            f"which has {size}, from 0"
        )


def _run(request: dict[str, Any]) -> list[dict[str, Any]]:
    model, output = _load(request["model"]), Path(request["output"])
    tokens = _tokens(request["model"], Path(request["prompt"]))
    _check_vocabulary(model, tokens, request["prompt"])
    found: dict[Any, Captured]
    if request["modules"]:
        found = dict(capture_modules(model, request["modules"], tokens))
    elif hasattr(model, "set_attn_implementation"):
        before_rope = request["before_rope"]
        found = dict(capture_layers(model, request["layers"], tokens, before_rope))
    else:
        raise ValueError("the model is not one of transformers: name its modules with --modules")
    rows = []
    for key, tensors in found.items():
        path = output if len(found) == 1 else output.with_stem(f"{output.stem}-{key}")
        save(tensors, path)
        q, k, v = tensors.q, tensors.k, tensors.v
        window = tensors.window if tensors.window and tensors.window <= q.shape[1] else None
        rows.append(
            {
                "file": str(path), "layer": key, "tokens": q.shape[1], "batch": len(q),
                "num_heads_q": q.shape[2], "num_heads_kv": k.shape[2], "head_dim": q.shape[3],
                "head_dim_v": different_or_zero(v.shape[3], q.shape[3]) or "",
                "dtype": str(q.dtype).removeprefix("torch."),
                "q times": f"{tensors.factor:.4g}" if tensors.factor != 1 else "",
                "mask": f"sliding_window_causal:window={window - 1}" if window else "",
            }
        )  # fmt: skip
    return rows


def main() -> int:
    request = json.load(sys.stdin)
    try:
        rows = _run(request)
    except (ValueError, ImportError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except Exception as error:  # a user's model may raise anything
        reason = " ".join(str(error).split())
        print(f"{request['model']}: {type(error).__name__}: {reason}", file=sys.stderr)
        return 2
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
