"""A package outside of cpbench whose entry points register operators, strategies and masks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from limits import LIMIT_S

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "acme-attention"
version = "1"
[tool.setuptools]
py-modules = {modules}
"""


def install_plugin(folder: Path, modules: Mapping[str, str], entry_points: str) -> dict[str, str]:
    """Install modules into a folder; returns the environment in which cpbench finds them.

    Args:
        modules: source code by name.
        entry_points: tables of ``pyproject.toml``.
    """
    package = folder / "acme"
    package.mkdir()
    for name, source in modules.items():
        (package / f"{name}.py").write_text(source)
    project = PROJECT.format(modules=list(modules)) + entry_points
    (package / "pyproject.toml").write_text(project)
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--no-build-isolation", "--disable-pip-version-check",
            "--target", str(folder / "site"), str(package),
        ],
        check=True, capture_output=True, timeout=LIMIT_S,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(folder / "site")}
