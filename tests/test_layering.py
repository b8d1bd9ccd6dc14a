"""Imports go downward only, the parent loads no torch, and the linked folders are links."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "launchers", "reports", "slurm")

# Modules of cpbench by layer; a folder stands for all that is in it.
LAYERS = (
    (
        "mask",
        "head_masks",
        "dilated_mask",
        "problem",
        "record",
        "environment",
        "registry",
        "spec",
        "settings",
        "launch",
        "bootstrap",
    ),
    (
        "masks",
        "layout",
        "dealing",
        "needs",
        "mesh",
        "world",
        "merge",
        "comm",
        "comm_mpi",
        "link_work",
        "trace",
        "device",
        "inputs",
        "planted",
        "captured",
        "operator",
        "library",
        "strategy",
        "tiling",
        "autograd_op",
        "pooling",
        "selection",
        "selecting",
    ),
    ("kernels", "strategies", "selectors"),
    (
        "api",
        "buffers",
        "check",
        "check_at_size",
        "check_choice",
        "quality",
        "measure",
        "exposure",
        "clocks",
        "timeline",
        "slices",
        "telemetry",
        "peaks",
    ),
    ("evaluate",),
    ("worker", "trace_ranks", "aot", "tuner", "node_probe"),
    ("links",),
)
# The parent's own order.  It plans with the torch-free part of the lower layers.
PARENT = (
    ("store", "ask", "presence", "ticker", "content"),
    ("sweep", "launchers", "reports", "estimate", "nodecheck"),
    ("runs", "catalogue", "diagnosis", "forecast", "linkcheck", "options", "compilation"),
    ("slurm", "verification"),
    ("support",),
    ("progress",),
    ("cli_tools", "cli_jobs", "cli_reports"),
    ("cli",),
)
SHARED = ("store",)  # what both worlds use: job files, journals, records
STORING = ("worker", "links", "tuner", "telemetry", "node_probe")  # who may
HEAVY = (
    "torch",
    "triton",
    "mpi4py",
    "flash_attn",
    "flash_attn_interface",
    "flashinfer",
    "flashmask",
    "interface_torch",
    "fastvideo_kernel",
    "ring_flash_attn",
    "magi_attention",
    "transformer_engine",
    "yunchang",
    "deepspeed",
)


def sources() -> dict[str, Path]:
    """Every module of cpbench by its name below ``cpbench``."""
    found = {}
    for top in (ROOT / "cpbench", *(ROOT / name for name in LINKED)):
        for path in top.rglob("*.py"):
            if top.name != "cpbench":
                parts = (top.name, *path.relative_to(top).with_suffix("").parts)
            else:
                parts = path.relative_to(top).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """The cpbench modules that a file imports, at any depth, type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where things are"
            names = [node.module or ""]
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.removeprefix("cpbench.") in known for name in deeper):
                names = deeper
        else:
            continue
        for name in names:
            if name.startswith("cpbench."):
                yield name.removeprefix("cpbench.")


SOURCES = sources()
IMPORTS = {name: sorted(set(imported(path, set(SOURCES)))) for name, path in SOURCES.items()}


def top(name: str) -> str:
    return name.partition(".")[0]


def level(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if top(name) in layer), None)


def rank(name: str) -> int | None:
    return next((i for i, layer in enumerate(PARENT) if top(name) in layer), None)


def test_every_module_has_a_layer() -> None:
    homeless = [
        n
        for n in SOURCES
        if level(n) is None and rank(n) is None and top(n) not in ("__init__", "sweeps")
    ]
    assert not homeless, f"put {homeless} into LAYERS or PARENT"
    assert len(SOURCES) > 40


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_go_downward(name: str) -> None:
    here = level(name)
    for other in IMPORTS[name]:
        if here is not None:
            there = level(other)
            if there is None:
                assert top(name) in STORING, f"{name} imports {other} of the parent"
                assert top(other) in SHARED, f"{name} imports {other} of the parent"
            else:
                assert there <= here, f"{name} (layer {here}) imports {other} (layer {there})"
        elif name != "__init__" and (below := rank(other)) is not None:  # that shows all
            assert below <= (rank(name) or 0), f"{name} imports {other}, which is above it"


@pytest.mark.parametrize("name", [n for n in sorted(SOURCES) if top(n) == "kernels"])
def test_kernels_stand_alone(name: str) -> None:
    """A family may spread over files that share its name: bands, bands_cpu."""
    own = name.partition(".")[2]
    for other in IMPORTS[name]:
        assert top(other) != "strategies", f"{name} imports {other}"
        if top(other) == "kernels":
            sibling = other.partition(".")[2]
            assert sibling.split("_")[0] == own.split("_")[0], f"{name} imports {other}"


@pytest.mark.parametrize(
    "name", [n for n in sorted(SOURCES) if top(n) in ("strategies", "selectors")]
)
def test_strategies_and_selectors_import_no_kernel(name: str) -> None:
    for other in IMPORTS[name]:
        assert top(other) != "kernels", f"{name} imports {other}: it receives an operator"


def test_only_check_and_the_tuner_import_a_kernel() -> None:
    users = {
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if top(other) == "kernels" and top(name) != "kernels"
    }
    assert users <= {
        ("check", "kernels.reference"),
        ("check_choice", "kernels.reference"),
        ("tuner", "kernels.triton_configs"),
        ("tuner", "kernels.triton_launch"),
    }


@pytest.mark.parametrize("name", ["worker", "api", "check", "measure"])
def test_the_worker_reaches_no_launcher_or_report(name: str) -> None:
    reached, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module not in reached:
            reached.add(module)
            todo += IMPORTS.get(module, [])
    assert not {top(module) for module in reached} & {"launchers", "reports", "cli", "runs"}


def loads(code: str, *banned: str) -> None:
    """Run code in a fresh interpreter and see that it loads none of some packages."""
    text = f"import sys\n{code}\nfound = set({banned}) & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_parent_loads_no_torch() -> None:
    parents = [name for name in SOURCES if rank(name) is not None]
    assert {"cli", "sweep", "store", "runs", "launchers.local", "reports.render"} <= set(parents)
    lines = [f"import cpbench.{name}" for name in parents]
    lines += [
        "from cpbench import registry, masks",
        "registry.operators()",
        "registry.strategies()",
        "masks.describe()",
    ]
    loads("\n".join(lines), *HEAVY)


def test_importing_cpbench_loads_next_to_nothing() -> None:
    loads("import cpbench", *HEAVY, "numpy", "pandas", "matplotlib", "typer", "rich", "pynvml")


def test_the_worker_s_modules_load_no_optional_package() -> None:
    names = [n for n in sorted(SOURCES) if level(n) is not None and not n.endswith("_device")]
    # pynvml is not asked for: torch itself imports it where it is there.
    loads(
        "\n".join(f"import cpbench.{name}" for name in names),
        *HEAVY[1:],
        "pyarrow",
        "matplotlib",
        "typer",
        "rich",
    )


def test_the_check_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import os\ndef f():\n    from cpbench import api\n"
        "    import cpbench.kernels.bands\n    from cpbench.mask import AttnMask\n"
    )
    assert list(imported(file, set(SOURCES))) == ["api", "kernels.bands", "mask"]


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders(name: str) -> None:
    link = ROOT / "cpbench" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()
    assert any((ROOT / name).iterdir()), "git keeps no empty folder, and the link would dangle"
