"""The examples of CONTRIBUTING.md, installed as another package, pass the check."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from paths import ROOT
from plugin_package import install_plugin

ENTRY_POINTS = """
[project.entry-points."cpbench.operators"]
operator = "mine_operator:OP"
selector = "mine_selector:SELECTOR"
[project.entry-points."cpbench.strategies"]
strategy = "mine_strategy:STRATEGY"
[project.entry-points."cpbench.masks"]
mask = "mine_mask:mine_band"
"""


def examples() -> dict[str, str]:
    """The Python code of each section by what it is about; without registering masks twice."""
    sections = re.split(
        r"^## An? (\w+) is one .*$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M
    )
    by_topic = dict(zip(sections[1::2], sections[2::2], strict=True))
    code = {
        f"mine_{topic}": re.findall(r"```python\n(.*?)```", text, re.S)
        for topic, text in by_topic.items()
    }
    found = {name: "\n".join(blocks) for name, blocks in code.items() if blocks}
    found["mine_mask"] = found["mine_mask"].replace("@pattern\n", "")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    modules = examples()
    assert set(modules) == {"mine_operator", "mine_selector", "mine_strategy", "mine_mask"}
    return install_plugin(tmp_path_factory.mktemp("contributing"), modules, ENTRY_POINTS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--operator", "mine", "--world-size", "1"),
        ("--operator", "mine", "--strategy", "ring", "--world-size", "2", "--mask", "causal"),
        ("--operator", "mine_selector", "--mask", "causal", "--world-size", "1"),
        ("--strategy", "mine_strategy", "--world-size", "3", "--mask", "causal"),
        ("--operator", "bands", "--mask", "mine_band:width=9", "--world-size", "1"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_examples_are_verified(
    environment: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cpbench", "verify", *arguments, "--dtype", "float32", "--json"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout)
    assert sum(row["ok"] for row in rows) > 0
    assert not any(row.get("failed") for row in rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The files of "From a file first", in a folder, and its commands."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## From a file first\n")[2].partition("\n## ")[0]
    folder = tmp_path_factory.mktemp("files")
    for name, code in zip(
        ("op", "mask"), re.findall(r"```python\n(.*?)```", section, re.S), strict=True
    ):
        (folder / f"{name}.py").write_text(code)
    (folder / "strat.py").write_text(examples()["mine_strategy"])
    (commands,) = re.findall(r"```\n(cpbench .*?)```", section, re.S)
    return folder, [shlex.split(line) for line in commands.splitlines()]


@pytest.mark.parametrize("number", range(6))
def test_files_run_as_they_stand(files: tuple[Path, list[list[str]]], number: int) -> None:
    folder, commands = files
    assert len(commands) == 6
    _, *words = commands[number]
    done = subprocess.run(
        [sys.executable, "-m", "cpbench", *words], cwd=folder, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " wrong" not in done.stdout
    if words[0] == "verify":
        assert re.search(r"\b[1-9]\d* ok\b", done.stdout)
