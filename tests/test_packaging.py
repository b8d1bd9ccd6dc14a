"""What is shipped: the linked folders as real files, the data, and nothing generic on top."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from limits import LIMIT_S
from paths import ROOT

SHIPPED = [
    "cpbench/kernels/bands/operator.py",
    "cpbench/kernels/sdpa.py",
    "cpbench/launchers/local.py",
    "cpbench/reports/tables/render.py",
    "cpbench/strategies/ring.py",
    "cpbench/masks/patterns.py",
    "cpbench/masks/data/doc_length_histograms.json",
    "cpbench/sweep/packaged/quick.toml",
    "cpbench/sweep/packaged/longca.toml",
    "cpbench/sweep/packaged/longca_cp.toml",
    "cpbench/reports/page/web/report.html.j2",
    "cpbench/slurm/job.sbatch",
    "cpbench/py.typed",
]


SHIPPED_SUFFIXES = (".py", ".json", ".toml", ".sbatch", ".j2", ".js", ".css", "py.typed")


def sources() -> set[str]:
    """What belongs into a wheel, by the names it has there."""
    found = set()
    for folder, _, files in os.walk(ROOT / "cpbench", followlinks=True):
        where = Path(folder).relative_to(ROOT)
        if "__pycache__" not in where.parts:
            found |= {str(where / file) for file in files if not file.startswith(".")}
    return {name for name in found if name.endswith(SHIPPED_SUFFIXES)}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from the sdist (not from the tree: that is what pip does)."""
    out, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tree") / "cpbench"
    # A copy: what an earlier build left in the tree (SOURCES.txt) would hide a missing pattern.
    anywhere = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")

    def ignored(folder: str, names: list[str]) -> set[str]:
        made_here = {"build", "dist", "results"} if Path(folder) == ROOT else set()
        return anywhere(folder, names) | (made_here & set(names))

    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def names(built: tuple[Path, Path]) -> set[str]:
    with zipfile.ZipFile(built[1]) as wheel:
        return set(wheel.namelist())


def test_wheel_has_everything(names: set[str]) -> None:
    assert set(SHIPPED) <= sources() <= names


def test_wheel_has_nothing_generic(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"cpbench"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_wheel_files_are_real(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        for name in SHIPPED:
            assert wheel.getinfo(name).external_attr >> 28 != 0xA, f"{name} is a link"
            assert wheel.read(name) == (ROOT / name).read_bytes()


def test_sdist_has_the_tree(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert {"pyproject.toml", *SHIPPED} <= set(members)
    assert not [name for name in members if name.startswith((".venv", "results", "build/"))]


def test_a_copy_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--disable-pip-version-check",
            "--target",
            str(target),
            str(built[1]),
        ],
        check=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    code = (
        "import cpbench, cpbench.kernels.bands.operator as b; print(cpbench.__file__, b.__file__)"
    )
    environ = {**os.environ, "PYTHONPATH": str(target)}

    def python(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words],
            cwd=elsewhere,
            env=environ,
            text=True,
            capture_output=True,
            check=True,
            timeout=LIMIT_S,
        ).stdout

    assert all(path.startswith(str(target)) for path in python("-c", code).split())
    assert "causal_document" in python("-m", "cpbench", "list", "masks")
    assert "bands" in python("-m", "cpbench", "list", "operators", "--device", "cpu")
    assert "quick" in python("-m", "cpbench", "list", "sweeps")
    assert not list(elsewhere.iterdir())
