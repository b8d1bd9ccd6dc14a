"""Markup of text reports: plain text for a terminal, Markdown, LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.reports.tables.terminal import fit_table, listing, table_lines, text_columns, wrap

MARKS = "*†‡§¶"  # of footnotes
_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$",
    "†": r"$\dagger$", "‡": r"$\ddagger$", "§": r"\S{}", "¶": r"\P{}", "×": r"$\times$",
    "≤": r"$\le$", "−": r"$-$", "∞": r"$\infty$", "…": r"\ldots{}", "→": r"$\to$", "\"": "''",
}  # fmt: skip


@dataclass(frozen=True)
class Markup:
    """Plain text, and the interface of the other markups."""

    def text(self, text: str) -> str:
        """Escape text of any origin."""
        return text

    def paragraph(self, text: str) -> list[str]:
        """Lines of a sentence or more."""
        return wrap(text)

    def common(self, facts: str) -> list[str]:
        """What all cases have in common; nothing for ""."""
        return [*self.paragraph(f"Common to all cases: {facts}."), ""] if facts else []

    def title(self, text: str) -> list[str]:
        return [*wrap(f"# {text}"), ""]

    def section(self, text: str) -> list[str]:
        return [*wrap(f"## {text}", "   "), ""]

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """A table of rows with equal keys; empty columns are left out.  In a terminal that is too
        narrow for it, the reasons (``why``) are below their rows, or it is divided."""
        if "why" not in rows[0] or fit_table(rows).fits:
            return [*table_lines(rows), ""]
        listed = [{("summary" if k == "why" else k): v for k, v in row.items()} for row in rows]
        return [*listing(listed).split("\n"), ""]

    def notes(self, notes: Sequence[str]) -> list[str]:
        return [line for note in notes for line in wrap(note, "  ")]

    def failure(self, status: str, case: str, reason: str, log: str, more: str) -> list[str]:
        indent = " " * 9
        lines = [*wrap(f"{status:8} {case}", indent), *wrap(indent + reason, indent)]
        return lines + (wrap(f"{indent}log: {log}{more}", indent) if log else [])

    def document(self, lines: Sequence[str]) -> str:
        return "\n".join(lines) + "\n"


class Markdown(Markup):
    def text(self, text: str) -> str:
        return re.sub(r"([\\|*`<>])", r"\\\1", text)

    def paragraph(self, text: str) -> list[str]:
        return [self.text(text)]

    def title(self, text: str) -> list[str]:
        return [f"# {self.text(text)}", ""]

    def section(self, text: str) -> list[str]:
        return [f"## {self.text(text)}", ""]

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return [self._tabulate(rows, "github"), ""]

    def notes(self, notes: Sequence[str]) -> list[str]:
        return [f"- {self.text(note)}" for note in notes]

    def failure(self, status: str, case: str, reason: str, log: str, more: str) -> list[str]:
        location = f" (log: `{log}`{more})" if log else ""
        return [f"- **{status}** {self.text(case)}: {self.text(reason)}{location}"]

    def _tabulate(self, rows: Sequence[Mapping[str, Any]], form: str) -> str:
        from tabulate import tabulate

        columns, numeric = text_columns(rows)
        return str(
            tabulate(
                {self.text(k): [self.text(cell) for cell in cells] for k, cells in columns.items()},
                headers="keys",
                tablefmt=form,
                disable_numparse=True,
                colalign=["right" if numeric[key] else "left" for key in columns],
            )
        )


class Latex(Markdown):
    """A complete document with ``booktabs`` tables, scaled down to the page width where wide."""

    def text(self, text: str) -> str:
        escaped = "".join(_LATEX_ESCAPES.get(letter, letter) for letter in text)
        return "".join(letter if letter.isascii() else "?" for letter in escaped)

    def title(self, text: str) -> list[str]:
        return [f"\\section*{{{self.text(text)}}}", ""]

    def section(self, text: str) -> list[str]:
        return [f"\\subsection*{{{self.text(text)}}}", ""]

    def table(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        tabular = self._tabulate(rows, "latex_raw")
        tabular = re.sub(r"\\hline", r"\\midrule", tabular)
        tabular = tabular.replace("\\midrule", "\\toprule", 1)
        head, _, tail = tabular.rpartition("\\midrule")
        return ["{\\centering\\small", "\\adjustbox{max width=\\linewidth}{%",
                f"{head}\\bottomrule{tail}}}\\par}}", ""]  # fmt: skip

    def notes(self, notes: Sequence[str]) -> list[str]:
        if not notes:
            return []
        return ["\\begin{itemize}", *(f"\\item {self.text(n)}" for n in notes), "\\end{itemize}"]

    def failure(self, status: str, case: str, reason: str, log: str, more: str) -> list[str]:
        location = f" (log: \\texttt{{{self.text(log)}}}{more})" if log else ""
        return [f"\\textbf{{{status}}} {self.text(case)}: {self.text(reason)}{location}\\par"]

    def document(self, lines: Sequence[str]) -> str:
        return "\n".join(
            ["\\documentclass{article}", "\\usepackage[T1]{fontenc}", "\\usepackage{booktabs}",
             "\\usepackage{adjustbox}", "\\usepackage[margin=2cm]{geometry}",
             "\\setlength{\\parindent}{0pt}", "\\begin{document}", "",
             *lines, "", "\\end{document}", ""]
        )  # fmt: skip


MARKUPS = {"table": Markup(), "short": Markup(), "md": Markdown(), "latex": Latex()}


def data_text(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """Rows for programs, as ``csv`` or ``json``."""
    if form == "json":
        return json.dumps(rows, indent=1) + "\n"
    import pandas as pd

    return str(pd.DataFrame(rows).to_csv(index=False))
