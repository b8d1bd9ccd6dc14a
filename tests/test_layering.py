"""The plan of the house: imports between wings go downward only, and the parent loads no torch."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from heavy_packages import HEAVY
from limits import LIMIT_S
from paths import ROOT

LINKED = ("kernels", "launchers", "reports", "slurm")

# The wings, lowest first: each imports only itself and those before it.
WINGS = (
    "core",
    "results",
    "masks",
    "inputs",
    "parallel",
    "selectors",
    "kernels",
    "strategies",
    "layout",  # public name of parallel.layout
    "api",
    "verify",
    "measure",
    "simulator",
    "worker",
    "launchers",
    "sweep",
    "slurm",
    "reports",
    "integrations",
    "tools",
    "cli",
)
DOORS = ("", "__main__")  # `import cpbench` shows names of all wings, `python -m cpbench` runs one

# What a login node runs, and what is started from there in processes of its own.
PARENT = (
    "core", "results", "masks", "inputs", "simulator", "launchers", "sweep", "slurm", "reports",
    "tools", "cli",
)  # fmt: skip
SUBPROCESSES = (
    "integrations.capture", "tools.compiler.aot", "tools.links_operations", "tools.links_worker",
    "tools.compiler.tuner", "slurm.node_probe", "simulator.recording",
    "simulator.side_work.launches", "simulator.side_work.strided_tensor",
)  # fmt: skip

MOST_LINES = 400
MOST_FILES = 13  # side by side in a folder


def sources() -> dict[str, Path]:
    """Every module of cpbench by its name below ``cpbench``; ``""`` is the package itself."""
    by_name = {}
    for top in (ROOT / "cpbench", *(ROOT / name for name in LINKED)):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            parts = parts if top.name == "cpbench" else (top.name, *parts)
            by_name[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return by_name


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The cpbench modules that a file imports, at any depth, but for type checking alone."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        todo += reversed(list(ast.iter_child_nodes(node)))
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where things are"
            names = []
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.append(deeper if deeper.removeprefix("cpbench.") in known else node.module)
        else:
            continue
        for name in dict.fromkeys(names):
            if name.startswith("cpbench."):
                yield name.removeprefix("cpbench.")


SOURCES = sources()


@functools.cache
def all_imports() -> dict[str, list[str]]:
    """What each module imports; not found out where tests are only collected, which each worker
    does."""
    return {
        name: sorted(set(imported(path.read_text(), set(SOURCES))))
        for name, path in SOURCES.items()
    }


def wing(module: str) -> str:
    return module.partition(".")[0]


def upward(name: str, imports: list[str]) -> list[str]:
    """Imports of a module that go up, in words; the names of both."""
    floor = WINGS.index(wing(name))
    return [
        f"cpbench.{name} imports cpbench.{other}: the wing {wing(name)} is below {wing(other)}"
        for other in imports
        if WINGS.index(wing(other)) > floor
    ]


def test_every_module_is_in_a_wing() -> None:
    homeless = [name for name in SOURCES if name not in DOORS and wing(name) not in WINGS]
    assert not homeless, f"{homeless}: put them into one of the wings {WINGS}"
    empty = [one for one in WINGS if not any(wing(name) == one for name in SOURCES)]
    assert not empty, f"nothing is in {empty}"


@pytest.mark.parametrize("name", sorted(set(SOURCES) - set(DOORS)))
def test_imports_go_downward(name: str) -> None:
    wrong = upward(name, all_imports()[name])
    assert not wrong, "\n".join(wrong)


def test_an_import_that_goes_up_is_named() -> None:
    source = "def f():\n    from cpbench import api\n    import cpbench.reports.frame\n"
    assert upward("measure.timing", list(imported(source, set(SOURCES)))) == [
        "cpbench.measure.timing imports cpbench.reports.frame: the wing measure is below reports"
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join((*path, name))}"
        if name not in done:
            for other in all_imports()[name]:
                if other in SOURCES and not _shown_by(other, name):
                    visit(other, (*path, name))
            done.add(name)

    for name in sorted(set(SOURCES) - set(DOORS)):
        visit(name, ())


def _shown_by(package: str, module: str) -> bool:
    """Whether a module imports from the package that it is in."""
    return module.startswith(f"{package}.")


@pytest.mark.parametrize("name", [n for n in sorted(SOURCES) if wing(n) == "kernels"])
def test_kernels_stand_alone(name: str) -> None:
    """A family is a folder, or files that share a name: sdpa, sdpa_cuda."""
    shared = ("kernels.autograd_op", "kernels.libraries.adapter", "kernels.triton.interpreter")
    folder, _, own = name.rpartition(".")
    for other in all_imports()[name]:
        if wing(other) == "kernels" and other not in shared:
            there, _, sibling = other.rpartition(".")
            family = folder != "kernels" and there.split(".")[:2] == folder.split(".")[:2]
            if folder in ("kernels", "kernels.libraries"):
                family = there == folder and sibling.split("_")[0] == own.split("_")[0]
            assert family, f"cpbench.{name} imports cpbench.{other}, another operator's"


@pytest.mark.parametrize(
    "name", [n for n in sorted(SOURCES) if wing(n) in ("strategies", "selectors")]
)
def test_strategies_and_selectors_import_no_kernel(name: str) -> None:
    for other in all_imports()[name]:
        assert wing(other) != "kernels", f"{name} imports {other}: it receives an operator"


def test_few_import_a_kernel() -> None:
    users = {
        (name, other)
        for name, others in all_imports().items()
        for other in others
        if wing(other) == "kernels" and wing(name) != "kernels"
    }
    assert users <= {
        ("verify.check", "kernels.reference"),
        ("verify.joined", "kernels.reference"),
        ("verify.selection", "kernels.reference"),
        ("api.distributed_mixing", "kernels.mixers.forms"),
        ("api.mixing", "kernels.mixers.operator"),
        ("verify.mixing", "kernels.mixers.chunks"),
        ("verify.mixing", "kernels.mixers.forms"),
        ("verify.mixing", "kernels.mixers.forward"),
        ("verify.mixing", "kernels.mixers.mixer"),
        ("verify.mixing", "kernels.mixers.operator"),
        ("verify.mixing", "kernels.mixers.recurrence"),
        ("sweep.estimate", "kernels.mixers.forms"),
        ("api.mixing", "kernels.mixers.chunks"),
        ("api.mixing", "kernels.mixers.forms"),
        ("api.mixing", "kernels.mixers.mixer"),
        ("api.mixing", "kernels.mixers.triton.launch"),
        ("tools.compiler.compilation", "kernels.triton.configs"),
        ("tools.compiler.tuner", "kernels.triton.configs"),
        ("tools.compiler.tuner", "kernels.triton.launch"),
        ("tools.support_matrix", "kernels.libraries.adapter"),
    }


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_fit_a_sitting(name: str) -> None:
    lines = len(SOURCES[name].read_text().splitlines())
    assert lines <= MOST_LINES, f"{SOURCES[name]} has {lines} lines: is there a second job inside?"


def test_folders_are_not_crowded() -> None:
    names = [path for path in SOURCES.values() if path.name != "__init__.py"]
    crowded = {
        str(folder): count
        for folder, count in Counter(path.parent for path in names).items()
        if count > MOST_FILES
    }
    assert not crowded, f"more than {MOST_FILES} files side by side: {crowded}"


def loads(code: str, *banned: str) -> None:
    """Run code in a fresh interpreter and see that it loads none of some packages."""
    text = f"import sys\n{code}\nthere = set({banned}) & set(sys.modules)\nassert not there, there"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr


def test_the_parent_loads_no_torch() -> None:
    parents = [n for n in SOURCES if wing(n) in PARENT and n not in SUBPROCESSES]
    assert {"cli.main", "sweep.runs", "results.store", "launchers.local"} <= set(parents)
    lines = [f"import cpbench.{name}" for name in parents]
    lines += [
        "from cpbench import layout, masks",
        "from cpbench.core import registry",
        "registry.operators()",
        "registry.strategies()",
        "masks.describe()",
    ]
    loads("\n".join(lines), *HEAVY)


def test_importing_cpbench_loads_next_to_nothing() -> None:
    loads("import cpbench", *HEAVY, "numpy", "pandas", "matplotlib", "typer", "rich", "pynvml")


def test_the_worker_loads_no_optional_package() -> None:
    highest = WINGS.index("worker")
    names = [
        name
        for name in sorted(set(SOURCES) - set(DOORS))
        if (WINGS.index(wing(name)) <= highest or name in SUBPROCESSES)
        and not name.endswith("_device")
    ]
    # pynvml is not asked for: torch itself imports it where it is there.
    loads(
        "\n".join(f"import cpbench.{name}" for name in names),
        *HEAVY[1:],
        "pyarrow",
        "matplotlib",
        "typer",
        "rich",
    )


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders(name: str) -> None:
    link = ROOT / "cpbench" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()
    assert any((ROOT / name).iterdir()), "git keeps no empty folder, and the link would dangle"
