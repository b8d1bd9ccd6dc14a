"""A run as one self-contained HTML page: answers at a glance, every point back to its samples.

The page asks for nothing: libraries, data and pictures are in it (``assets``), and a content
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
from cpbench.reports.figures.style import looks
from cpbench.reports.labels import apart, significant
from cpbench.reports.page import (
    assets,
)
from cpbench.reports.page import (
    data as page_data,
)
from cpbench.reports.tables import (
    fastest_grids as best,
)
from cpbench.reports.tables import (
    overview,
)
from cpbench.reports.tables import (
    rows as tables,
)
from cpbench.reports.tables import (
    selection as choices,
)
from cpbench.reports.tables.render import Contents, caveats, checks, counts, readings
from cpbench.reports.tables.summary import methods
from cpbench.results.store import write_whole

INLINE = 400_000  # samples; more lie in files beside the page
CHUNK = 500  # cases of such a file
FAILURES = 200  # that are listed one by one
SCRIPTS = ("loader.js", "data.js", "charts.js", "details.js", "report.js")
CHARTS = (
    ("throughput", "Throughput by length", "From the mask's exact area; a cross is a failure."),
    ("memory", "Memory by length", "Peak beside the inputs, of the rank with the most; a cross on "
     "the limit is out of memory."),
    ("strong", "Strong scaling", "The same problem on more ranks: rate of a rank over that of one "
     "rank with the same operator, or of the fewest ranks measured."),
    ("weak", "Weak scaling", "As many tokens a rank on more ranks: rate of a rank, likewise."),
    ("communication", "Communication", "Bytes by link class."),
    ("exposure", "Exposed communication", "What communication adds to the slowest rank's time."),
    ("balance", "Balance between ranks", "1 is even."),
    ("pareto", "Time against memory", "On the dotted line nothing is both faster and smaller."),
    ("quality", "Recovered attention against time", "Of operators that choose what to attend to, "
     "and exact ones; on the dotted line nothing both is faster and recovers more."),
    ("roofline", "Roofline", "Peaks are a large matrix product and a large copy, measured on the "
     "same ranks at once."),
)  # fmt: skip
SECTIONS = (
    ("best", "Best choice"), ("choices", "Sparse choices"), ("charts", "Charts"),
    ("support", "Support"), ("failures", "Failures"), ("correctness", "Correctness"),
    ("noise", "Noise"), ("environment", "Where it ran"), ("cases", "All cases"),
)  # fmt: skip


def write(collection: Collection, path: Path) -> None:
    """Write the page, and where there are many samples a folder of them beside it.

    Raises:
        ValueError: when a library that it carries is not installed.
        OSError: when a file cannot be written.
    """
    samples = page_data.samples(collection)
    inline = sum(len(one) for launches in samples for one in launches) <= INLINE
    folder = f"{path.stem}_samples"
    if not inline:
        (path.parent / folder).mkdir(exist_ok=True)
        for number, start in enumerate(range(0, len(samples), CHUNK)):
            text = json.dumps(assets.packed_json(samples[start : start + CHUNK]))
            write_whole(
                path.parent / folder / f"{number}.js", f"cpbenchSamples({number}, {text});\n"
            )
    write_whole(path, _page(collection, samples if inline else None, "" if inline else folder))


def _page(collection: Collection, samples: Any, folder: str) -> str:
    told, table = Contents.of(collection), collection.table
    names = methods(table)
    data = page_data.data(collection)
    bests = best.winners(told.singles, told.families)
    failed = tables.failures(table)
    support = overview.support(table, names)
    worth = apart(choices.worth(table, told.varying))
    tables_js, tables_css = assets.data_tables()
    source = assets.script(*SCRIPTS)
    return filled(
        "report.html.j2",
        title=collection.title,
        counts=counts(table),
        throughout=told.throughout,
        when=_when(table["started"]),
        version=__version__,
        warnings=collection.warnings,
        sections=[one for one in SECTIONS if one[0] != "choices" or worth],
        worth=worth,
        paid=apart(choices.overtakes(table, told.varying)),
        charts=CHARTS,
        score=told.score,
        readings=readings(told.families),
        grids=best.grids(bests, told.varying),
        words=best.words,
        ms=lambda one: f"{significant(one.ms)} ms, {told.rate(one.tflops)} {told.rate.unit}",
        looks=looks(names),
        masks=data["masks"]
        | {
            mask: data["masks"][family]
            for mask, family in zip(table["mask"], table["mask_family"], strict=True)
            if family in data["masks"]
        },
        support=support,
        support_masks=sorted({mask for row in support.values() for mask in row}),
        refusals=tables.refusals(table),
        failures=overview.failures(failed, FAILURES),
        more_failures=max(0, len(failed) - FAILURES),
        checks=checks(told.timed),
        correctness=overview.correctness(table, names),
        noise=overview.noise(told.timed),
        caveats=caveats(told.timed, {}),
        environments=overview.environments(collection),
        runs=list(collection.runs),
        tables_css=tables_css,
        css=assets.script("page.css"),
        script=source,
        policy=assets.policy(source, beside=bool(folder)),
        blobs={
            "plotly": assets.plotly(),
            "datatables": tables_js,
            "data": assets.packed_json(data),
        },
        samples="" if samples is None else assets.packed_json(samples),
        folder=folder,
        chunk=CHUNK,
    )


def filled(template: str, **values: Any) -> str:
    """A template of ``web/``, everything escaped that is not marked as safe there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(assets.WEB), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["soft"] = _soft
    return environment.get_template(template).render(**values)


def _soft(text: str) -> Any:
    """Text that may break after punctuation."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([:,_/=])", r"\1<wbr>", str(escape(text))))


def _when(started: Any) -> str:
    known = started[started > 0]
    if known.empty:
        return "at an unknown time"
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) for at in (known.min(), known.max())
    )
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"
