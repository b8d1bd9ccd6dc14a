"""Functions with exactly the signatures of ``signatures/*.pyi``, for stand-ins of libraries.

Calls are bound as by Python, and arguments are checked against the annotations that typed schemas
enforce, so a wrong name, order or type fails as with the library.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "signatures"
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
    """The signature of a library's function.

    Attributes:
        stub: a Python function with the parameters and defaults of the library's.
        annotations: annotations of the parameters, as text.
    """

    def __init__(self, node: ast.FunctionDef) -> None:
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.annotations = {a.arg: ast.unparse(a.annotation) for a in parameters if a.annotation}
        stub = ast.parse(ast.unparse(node)).body[0]
        assert isinstance(stub, ast.FunctionDef)
        for child in ast.walk(stub):
            if isinstance(child, ast.arg):
                child.annotation = None
        stub.returns, stub.body, stub.decorator_list = None, [ast.Pass()], []
        namespace: dict[str, Any] = {}
        code = ast.fix_missing_locations(ast.Module([stub], []))
        exec(compile(code, "<signature>", "exec"), namespace)
        self.stub = namespace[node.name]

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All arguments of a call by name.

        Raises:
            TypeError: for a call that the library would refuse.
        """
        bound = inspect.signature(self.stub).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            allowed = _TYPES.get(self.annotations.get(name, ""))
            valid = allowed is None or isinstance(value, allowed)
            if allowed is not None and isinstance(value, bool) and bool not in allowed:
                valid = False
            if not valid:
                raise TypeError(f"{name} = {value!r} is not of type {self.annotations[name]}")
        bound.apply_defaults()
        return dict(bound.arguments)


@functools.cache
def signatures(file: str) -> dict[str, Signature]:
    """The signatures in ``signatures/<file>.pyi`` by name; methods as ``Class.method``."""
    by_name = {}
    for node in ast.parse((FOLDER / f"{file}.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            by_name[node.name] = Signature(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                assert isinstance(method, ast.FunctionDef)
                by_name[f"{node.name}.{method.name}"] = Signature(method)
    return by_name


def function(file: str, name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a library's signature that calls ``body`` with a dict of its arguments."""
    signature = signatures(file)[name]

    @functools.wraps(signature.stub)
    def call(*args: Any, **kwargs: Any) -> Any:
        return body(signature.bind(*args, **kwargs))

    return call


class CustomOperator:
    """A custom operator of torch, which does not expose its signature."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)
