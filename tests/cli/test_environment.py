"""The command line in other locales, without standard output, and with odd files."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from paths import ROOT

LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"PYTHONUTF8": "0", "PYTHONIOENCODING": "iso-8859-1"},
    "utf-8": {"PYTHONUTF8": "1"},
}
SWEEP = """# a sweep with ± and λ
[sweep]
seq_len = 64
num_heads_q = 2
head_dim = 16
[measure]
precision = 0.5
max_seconds = 0.5
"""


def run(
    *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> tuple[int, bytes, bytes]:
    command = [sys.executable, "-m", "cpbench", *map(str, arguments)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON", "LANG"))}
    result = subprocess.run(
        command, capture_output=True, env={**environ, **(env or {})}, cwd=cwd, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    untimed = re.sub(rb"build_ms +\S+", b"", result.stdout)
    return result.returncode, untimed, result.stderr


def test_every_locale_reads_and_prints_the_same(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(b"\xef\xbb\xbf" + SWEEP.encode())  # with a byte-order mark
    (tmp_path / "längen-µ.txt").write_bytes(b"\xef\xbb\xbf40\n24\n")
    code, _, err = run("run", "s.toml", "--out", "run", cwd=tmp_path, env=LOCALES["ascii"])
    assert code == 0, err
    commands: list[tuple[object, ...]] = [
        ("list", "masks"),
        ("mask", "causal_document:file=längen-µ.txt", "--seq-len", "64"),
        ("report", "run"),
        ("report", "run", "-o", "page.html"),
        ("mask", "causal_document:file=kürzer.txt", "--seq-len", "64"),
    ]
    pages = []
    for command in commands:
        results = [run(*command, cwd=tmp_path, env=env) for env in LOCALES.values()]
        assert b"Traceback" not in results[0][2]
        assert results[0] == results[1] == results[2], command
        results[0][1].decode("utf-8")
        if "page.html" in command:
            pages.append((tmp_path / "page.html").read_bytes().decode("utf-8"))
    assert all("Ã" not in page for page in pages)
    assert 'charset="utf-8"' in pages[0]


def test_standard_output_that_is_closed(tmp_path: Path) -> None:
    command = f"{sys.executable} -m cpbench list masks >&-"
    result = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert result.returncode == 2
    assert result.stderr == (
        "cpbench: standard output is closed: redirect it to a file or /dev/null\n"
    )


def test_a_run_directory_that_is_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    code, _, err = run("run", "quick", "--out", "link/run", cwd=tmp_path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert b"is a link to gone, which is missing" in err


@pytest.mark.parametrize("interface", ["nosuch0", "^lo,docker", "lo,nosuch0"])
def test_an_interface_that_does_not_exist(tmp_path: Path, interface: str) -> None:
    for command in (("run", "quick", "--out", "run"), ("join", "run")):
        (tmp_path / "run").mkdir(exist_ok=True)
        code, _, err = run(*command, "--interface", interface, cwd=tmp_path)
        assert (code, len(err.splitlines())) == (2, 1)
        assert b"there is no network interface" in err
        assert b"there are: " in err
        assert b"lo" in err


def test_text_files_name_their_encoding() -> None:
    """In text mode, the encoding is given: the locale would decide otherwise."""
    unnamed = []
    for top in ("cpbench", "kernels", "launchers", "slurm", "reports"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _decodes(node) and not _names_encoding(node):
                    unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert unnamed == []


def _decodes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg for keyword in call.keywords}
    if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute):
        return True
    if name == "open" and isinstance(call.func, ast.Name):
        mode = call.args[1] if len(call.args) > 1 else None
        return "b" not in str(getattr(mode, "value", "r"))
    return bool({"text", "universal_newlines"} & keywords)


def _names_encoding(call: ast.Call) -> bool:
    texts = [str(getattr(argument, "value", "")) for argument in call.args]
    return "encoding" in {keyword.arg for keyword in call.keywords} or any(
        text.startswith("utf-8") for text in texts
    )


def test_files_to_start_from(tmp_path: Path) -> None:
    code, out, err = run("init", cwd=tmp_path)
    assert code == 0, err
    assert b"next: cpbench run sweep.toml --dry-run" in out
    code, out, err = run("run", "sweep.toml", "--dry-run", cwd=tmp_path)
    assert code == 0, err
    options = ("--launcher", "slurm", "--profile", "site.toml", "--out", "run", "--dry-run")
    code, out, err = run("run", "sweep.toml", *options, cwd=tmp_path)
    assert code == 0, err
    assert b"#SBATCH" in out
    code, _, err = run("init", cwd=tmp_path)
    assert (code, err) == (
        2, b"cpbench: sweep.toml exists: move it away, or give another folder\n"
    )  # fmt: skip
    code, _, err = run("init", "nowhere", cwd=tmp_path)
    assert (code, err) == (2, b"cpbench: there is no folder nowhere\n")


def test_every_key_of_the_templates_exists(tmp_path: Path) -> None:
    """The commented lines too."""
    run("init", cwd=tmp_path)
    site = (tmp_path / "site.toml").read_text(encoding="utf-8")
    uncommented = re.sub(r"(?m)^# (?=\w+ = |\[)", "", site)
    (tmp_path / "site.toml").write_text(uncommented, encoding="utf-8")
    sweep = (tmp_path / "sweep.toml").read_text(encoding="utf-8")
    uncommented = re.sub(r"(?m)^# (?=\w+ = )", "", sweep).replace('inputs = "file', '# "file')
    (tmp_path / "sweep.toml").write_text(uncommented, encoding="utf-8")
    options = ("--launcher", "slurm", "--profile", "site.toml", "--out", "run", "--dry-run")
    code, _, err = run("run", "sweep.toml", *options, cwd=tmp_path)
    assert code == 0, err


def test_version_and_completion() -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(rb"cpbench \S+, torch \d+\.\d+\S*\n", out)
    for words, expected in (
        ("cpbench ve", b"verify"),
        ("cpbench bench --laun", b"--launcher"),
        ("cpbench bench --operator bands,flashi", b"bands,flashinfer.dense"),
        ("cpbench bench --strategy uly", b"ulysses"),
        ("cpbench verify --mask causal_b", b"causal_blockwise"),
        ("cpbench run qui", b"quick"),
    ):
        env = {
            "_CPBENCH_COMPLETE": "complete_bash", "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }  # fmt: skip
        code, out, _ = run(env=env)
        assert code == 0
        assert expected in out.split()


NAMED = {
    "operator": "operators", "strategy": "strategies", "layout": "layouts", "mask": "masks",
    "inputs": "inputs", "rope": "ropes", "dtype": "dtypes", "direction": "directions",
    "sweep": "sweeps",
}  # fmt: skip


def test_every_option_that_takes_a_name_completes_it() -> None:
    import typer.main

    from cpbench.cli.completion import complete
    from cpbench.cli.main import app

    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            if parameter.name in NAMED:
                items = parameter.shell_complete(None, "")
                found[name, parameter.name] = bool(items)
    assert len(found) >= 20
    assert not [where for where, completes in found.items() if not completes]
    assert complete("operators")("bands,band") == []
    assert complete("dtypes")("float32,bf") == ["float32,bfloat16"]
