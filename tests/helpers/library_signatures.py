"""Functions with exactly the signatures of ``stand_ins/*.pyi``, for stand-ins of libraries.

A call is bound as Python binds it, and arguments are held against the annotations that typed
schemas enforce, so a wrong name, order or type fails as it would on the library.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "stand_ins"
_TENSOR, _NONE = (torch.Tensor,), (type(None),)
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": _TENSOR,
    "torch.Tensor": _TENSOR,
    "float": (float,),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "torch.dtype": (torch.dtype,),
    "Union[str, torch.dtype]": (str, torch.dtype),
    "Tuple[int, int]": (tuple,),
    "List[torch.Tensor]": (list,),
}
for _name, _types in list(_TYPES.items()):
    _TYPES[f"Optional[{_name}]"] = _TYPES[f"{_name} | None"] = (*_types, *_NONE)


class Signature:
    """One function of a library.

    Attributes:
        stub: a Python function with the library's parameters and defaults.
        annotations: their annotations, as text.
    """

    def __init__(self, node: ast.FunctionDef) -> None:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.annotations = {a.arg: ast.unparse(a.annotation) for a in every if a.annotation}
        bare = ast.parse(ast.unparse(node)).body[0]
        assert isinstance(bare, ast.FunctionDef)
        for one in ast.walk(bare):
            if isinstance(one, ast.arg):
                one.annotation = None
        bare.returns, bare.body, bare.decorator_list = None, [ast.Pass()], []
        space: dict[str, Any] = {}
        code = ast.fix_missing_locations(ast.Module([bare], []))
        exec(compile(code, "<signature>", "exec"), space)
        self.stub = space[node.name]

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every argument by name.

        Raises:
            TypeError: for a call that the library would not take.
        """
        bound = inspect.signature(self.stub).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            allowed = _TYPES.get(self.annotations.get(name, ""))
            fits = allowed is None or isinstance(value, allowed)
            if allowed is not None and isinstance(value, bool) and bool not in allowed:
                fits = False
            if not fits:
                raise TypeError(f"{name} = {value!r} is no {self.annotations[name]}")
        bound.apply_defaults()
        return dict(bound.arguments)


@functools.cache
def signatures(file: str) -> dict[str, Signature]:
    """The functions of ``stand_ins/<file>.pyi``; methods as ``Class.method``."""
    found = {}
    for node in ast.parse((FOLDER / f"{file}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = Signature(node)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                assert isinstance(inner, ast.FunctionDef)
                found[f"{node.name}.{inner.name}"] = Signature(inner)
    return found


def function(file: str, name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a library's signature; ``body`` takes its arguments by name, in one dict."""
    signature = signatures(file)[name]

    @functools.wraps(signature.stub)
    def call(*args: Any, **kwargs: Any) -> Any:
        return body(signature.bind(*args, **kwargs))

    return call


class Hidden:
    """A custom operator of torch: what it takes shows only when it is called, by its schema."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)
