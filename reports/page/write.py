"""A report as one self-contained HTML page: tables and charts, down to the samples of each point.

The page loads nothing: libraries, data and pictures are embedded (``assets``), and a content
security policy forbids the rest.  Text from outside is escaped by the template engine; our own
scripts set text, never markup.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from cpbench import __version__
from cpbench.reports.collection import Collection
from cpbench.reports.figures.style import method_styles
from cpbench.reports.labels import group_by_problem, three_digits
from cpbench.reports.mixers import beside
from cpbench.reports.page import assets
from cpbench.reports.page.data import chart_data, samples_by_row
from cpbench.reports.page.figures import needle_figures
from cpbench.reports.predicted.rows import predicted_rows, prediction_notes
from cpbench.reports.tables import overview
from cpbench.reports.tables import rows as tables
from cpbench.reports.tables.fastest_grids import fastest_grids, fastest_methods, verdict_text
from cpbench.reports.tables.notes import (
    FLAG_MEANINGS,
    caveat_notes,
    check_notes,
    contest_notes,
    seed_notes,
)
from cpbench.reports.tables.render import ReportContents
from cpbench.reports.tables.selection import break_even_rows, recall_rows
from cpbench.reports.tables.summary import method_names
from cpbench.results.store import write_atomically

MAX_INLINE_SAMPLES = 400_000  # more are written to files beside the page
CHUNK_CASES = 500  # per file of samples
MAX_FAILURES = 200  # that are listed one by one
SCRIPTS = ("loader.js", "data.js", "charts.js", "details.js", "report.js")
CHARTS = (
    ("throughput", "Throughput and time by length", "Rates are of the exact area of the mask; a "
     "cross is a failure."),
    ("memory", "Memory by length", "Peak excluding the inputs, max per rank; a cross on the limit "
     "is out of memory."),
    ("strong", "Strong scaling", "The same problem on more ranks: rate per rank over that of one "
     "rank with the same operator, or of the fewest ranks measured."),
    ("weak", "Weak scaling", "The same number of tokens per rank on more ranks: rate per rank, "
     "relative to the same baseline."),
    ("communication", "Communication", "Bytes sent inside a node and across nodes."),
    ("exposure", "Exposed communication", "Time that communication adds on the slowest rank."),
    ("imbalance", "Load imbalance", "Max/mean work per rank; 1 is even."),
    ("pareto", "Time against memory", "Dotted: Pareto front; no method is both faster and "
     "smaller."),
    ("quality", "Attention recall against time", "Selectors and exact methods. Dotted: Pareto "
     "front; no method is both faster and has a higher recall."),
    ("roofline", "Roofline", "Peaks are a large matrix product and a large copy, measured on the "
     "same ranks at once."),
)  # fmt: skip
SECTIONS = (
    ("fastest", "Fastest method per problem"), ("predicted", "Predicted"),
    ("selection", "Sparse selection"), ("needles", "Needles"), ("mixers", "Sequence mixers"),
    ("charts", "Charts"),
    ("support", "Support"), ("failures", "Failures"), ("correctness", "Correctness"),
    ("noise", "Noise"), ("environment", "Environment"), ("cases", "All cases"),
)  # fmt: skip


def write_page(collection: Collection, path: Path) -> None:
    """Write the page, and where there are many samples a folder of them beside it.

    Raises:
        ValueError: when a library that is embedded is not installed.
        OSError: when a file cannot be written.
    """
    samples = samples_by_row(collection)
    inline = sum(len(launch) for launches in samples for launch in launches) <= MAX_INLINE_SAMPLES
    folder = f"{path.stem}_samples"
    if not inline:
        (path.parent / folder).mkdir(exist_ok=True)
        for chunk, start in enumerate(range(0, len(samples), CHUNK_CASES)):
            text = json.dumps(assets.pack_json(samples[start : start + CHUNK_CASES]))
            write_atomically(
                path.parent / folder / f"{chunk}.js", f"cpbenchSamples({chunk}, {text});\n"
            )
    write_atomically(
        path, _render(collection, samples if inline else None, "" if inline else folder)
    )


def _render(collection: Collection, samples: Any, folder: str) -> str:
    contents, table = ReportContents.from_collection(collection), collection.table
    facts, rate = contents.varying_facts, contents.rate
    names = method_names(table)
    data = chart_data(collection)
    fastest = fastest_methods(contents.rankings, contents.seed_groups)
    failed = tables.failed_cases(table)
    support = overview.support_table(table, names)
    recall = group_by_problem(recall_rows(table, facts))
    predicted = group_by_problem(predicted_rows(collection.predicted))
    mixers = [(title, group_by_problem(rows)) for title, rows in beside.sections(table, facts)]
    needles = needle_figures(collection)
    tables_js, tables_css = assets.packed_data_tables()
    source = assets.read_web(*SCRIPTS) if len(table) else ""
    return render_template(
        "report.html.j2",
        title=collection.title,
        counts=contents.counts,
        common_facts=contents.common_facts,
        measured_at=_time_span(table["started"]) if len(table) else "",
        version=__version__,
        warnings=collection.warnings,
        sections=[
            (name, title)
            for name, title in SECTIONS
            if {
                "selection": recall,
                "needles": needles,
                "mixers": mixers,
                "predicted": predicted,
            }.get(name, len(table))
        ],
        needles=needles,
        predicted=predicted,
        prediction_notes=prediction_notes(collection.predicted),
        recall=recall,
        break_even=group_by_problem(break_even_rows(table, facts)),
        mixers=mixers,
        charts=CHARTS,
        summary=contents.summary,
        contest_notes=[*contest_notes(contents.rankings), *seed_notes(contents.seed_groups)],
        grids=fastest_grids(fastest, facts),
        verdict_text=verdict_text,
        flag_meanings=FLAG_MEANINGS,
        time_text=lambda cell: f"{three_digits(cell.ms)} ms, {rate(cell.tflops)} {rate.unit}",
        styles=method_styles(names),
        masks=data["masks"]
        | {
            mask: data["masks"][family]
            for mask, family in zip(table["mask"], table["mask_family"], strict=True)
            if family in data["masks"]
        },
        support=support,
        support_masks=sorted({mask for row in support.values() for mask in row}),
        unsupported=tables.unsupported_rows(table),
        failures=overview.add_log_tails(failed, MAX_FAILURES),
        more_failures=max(0, len(failed) - MAX_FAILURES),
        checks=check_notes(contents.ok_rows),
        correctness=overview.correctness_rows(table, names),
        noise=overview.noise_rows(contents.ok_rows),
        caveats=caveat_notes(contents.ok_rows, {}),
        environments=overview.distinct_environments(collection),
        runs=list(collection.runs),
        tables_css=tables_css,
        css=assets.read_web("page.css"),
        script=source,
        policy=assets.security_policy(source, external_samples=bool(folder)),
        blobs={
            "plotly": assets.packed_plotly(),
            "datatables": tables_js,
            "data": assets.pack_json(data),
        }
        if len(table)
        else {},
        samples="" if samples is None else assets.pack_json(samples),
        folder=folder,
        chunk=CHUNK_CASES,
    )


def render_template(template: str, **values: Any) -> str:
    """Render a template of ``web/``; all values are escaped that are not marked as safe there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(assets.WEB), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(**values)


def _breakable(text: str) -> Any:
    """Text with possible line breaks after punctuation."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([:,_/=])", r"\1<wbr>", str(escape(text))))


def _time_span(started: Any) -> str:
    known = started[started > 0]
    if known.empty:
        return "at an unknown time"
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) for at in (known.min(), known.max())
    )
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"
