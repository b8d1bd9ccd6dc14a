"""Commented files to start from: a sweep and a site profile."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def write_templates(folder: Path) -> list[Path]:
    """Write a commented sweep and site profile; the paths.

    Raises:
        ValueError: if there is no such folder, or a file of one of these names.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    templates = resources.files("cpbench.sweep.templates")
    paths = {folder / name: templates.joinpath(name) for name in ("sweep.toml", "site.toml")}
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} exists: move it away, or give another folder")
    for path, template in paths.items():
        path.write_text(template.read_text("utf-8"), "utf-8")
    return list(paths)
