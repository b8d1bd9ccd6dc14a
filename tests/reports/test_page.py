"""The HTML page in a real browser: no errors or requests, filters, hover, samples, hostile text."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from browser import complaints, opened, requests, until
from made_records import record

from cpbench.reports.collection import collect
from cpbench.reports.page import assets, write
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter

HOST = "<img src=x onerror=\"document.title='pwned'\">"
ERROR = "</script><script>document.title='pwned'</script> `x` {{ 7*7 }} <b>bold</b>"
PILE = "causal_document:corpus=pile"
LIMIT = 1 << 34


def timed(operator: str, ms: float, **fields: Any) -> Record:
    """A record with everything that a report shows."""
    noise = random.Random(str((operator, ms)))
    made = record(operator, **fields)
    world = made.case.world_size
    made.times_us = {
        phase: [[1e3 * share * ms * noise.gauss(1, 0.02) for _ in range(12)] for _ in range(world)]
        for phase, share in (("fwd", 0.3), ("bwd", 0.7))
    }
    made.flops = {"fwd": 2 * 10**9, "bwd": 5 * 10**9}
    made.errors = {"small": {t: {"rel_l2": 2e-7, "max_rms": 1e-6} for t in ("out", "dq", "lse")}}
    made.memory_bytes = {"inputs": [10**6] * world, "peak": [int(ms * 1e6)] * world}
    made.bytes_sent = {"fwd": [3 * 10**6] * world} if world > 1 else {}
    made.bytes_across = {"fwd": [10**6] * world} if world > 1 else {}
    made.balance = [100 + 20 * rank for rank in range(world)]
    made.turns = [1] * 12
    made.area, made.environment, made.started, made.writer = 5e5, "e", 1.75e9, "w"
    return made


def sample_records() -> list[Record]:
    records = []
    for i, length in enumerate((1024, 2048, 4096)):
        for operator, ms in (("bands", 2.0), ("sdpa.cpu_flash", 3.0)):
            records.append(timed(operator, ms * 3**i, seq_len=length))
            records += [
                timed(operator, ms * 3**i + seed, seq_len=length, mask=f"{PILE},seed={seed}")
                for seed in range(7)
            ]
        for strategy in ("ring", "ulysses"):
            for world in (2, 4):
                records.append(
                    timed("bands", 3.0**i / world + 1, seq_len=length, strategy=strategy,
                          world_size=world)
                )  # fmt: skip
    records.append(
        record("sdpa.math", seq_len=4096, status="oom", reason=ERROR, environment="e",
               log="jobs/x/rank0.log")
    )  # fmt: skip
    records.append(record("flex", status="unsupported", reason="no <i>compiler</i>"))
    return records


def run_directory(folder: Path, records: list[Record]) -> Path:
    environment = {"kind": "environment", "id": "e", "host": HOST, "processor": "x & y",
                   "cores": 2, "memory_bytes": LIMIT, "packages": {"torch": "2"},
                   "variables": {"OMP_NUM_THREADS": ERROR},
                   "peaks": {"float32": 1.5, "copy_gb_s": 30.0}}  # fmt: skip
    (folder / "jobs" / "x").mkdir(parents=True)
    (folder / "jobs" / "x" / "rank0.log").write_text(f"Traceback\n{ERROR}\nlast words\n")
    with RecordWriter(folder / "records" / "w.jsonl") as writer:
        writer.append(environment)
        for case_record in records:
            writer.append(case_record.to_json())
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_directory(tmp_path_factory.mktemp("page") / "night <run>", sample_records())
    write.write_page(collect([folder]), folder / "report.html")
    return folder / "report.html"


def captions(browser: Any, kind: str) -> list[str]:
    script = (
        f"return [...document.querySelectorAll('#chart-{kind} figcaption')].map(c => c.innerText)"
    )
    return [str(text) for text in browser.execute_script(script)]


def wait_for_charts(browser: Any) -> None:
    """Scroll to the charts, which are drawn when they come into view, and wait."""
    browser.execute_script("document.getElementById('charts').scrollIntoView()")
    count = "return document.querySelectorAll('#chart-throughput .plot .points path').length"
    until(lambda: browser.execute_script(count))


def select_option(browser: Any, name: str, text: str) -> None:
    browser.execute_script(
        "const s = document.querySelector(`select[name=${arguments[0]}]`);"
        "s.value = [...s.options].find(o => o.text === arguments[1]).value;"
        "s.dispatchEvent(new Event('change'));", name, text,
    )  # fmt: skip


def shown_rows(browser: Any) -> int:
    info = str(browser.find_element("css selector", ".dt-info").text)
    return int(info.split("of")[1].split()[0])


def test_the_page_is_complete_and_requests_nothing(report: Path) -> None:
    text = report.read_text()
    assert "http://" not in text.split('<script type="text/plain"')[0].split("<style>")[0]
    with opened(report) as browser:
        assert browser.title == "night <run>"  # nothing ran that was in the data
        assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
        wait_for_charts(browser)
        body = browser.find_element("css selector", "body").text
        assert f"{HOST}, x & y" in body
        assert "no <i>compiler</i>" in body
        browser.execute_script("document.querySelector('.failure').open = true")
        failure = browser.find_element("css selector", ".failure").text
        assert " ".join(ERROR.split()) in failure
        assert "last words" in failure
        assert "1.50x over sdpa.cpu_flash" in body
        assert complaints(browser) == []
        assert requests(browser) <= {"file", "blob", "data"}


def test_filters(report: Path) -> None:
    with opened(report) as browser:
        shown = ["causal, world size 1", f"{PILE}, world size 1"]
        both = [text for name in shown for text in (name, f"{name}: time")]
        assert captions(browser, "throughput") == both
        assert captions(browser, "communication") == []
        assert shown_rows(browser) == len(sample_records())
        select_option(browser, "mask_family", PILE)
        assert captions(browser, "throughput") == both[2:]
        assert shown_rows(browser) == 42
        select_option(browser, "mask_family", "all")
        select_option(browser, "world_size", "4")
        assert captions(browser, "throughput")[0] == "causal, world size 4"
        assert captions(browser, "communication") == [
            "causal, 4k tokens, world size 4: plain inside a node, hatched across"
        ]
        select_option(browser, "pass", "backward phase")
        assert captions(browser, "imbalance") == ["causal, 4k tokens, world size 4"]
        assert complaints(browser) == []


def test_the_answer_comes_first_and_winners_carry_their_caveats(tmp_path: Path) -> None:
    records = [timed("bands", 2.0, flags=["oversubscribed"]), timed("sdpa.cpu_flash", 3.0)]
    folder = run_directory(tmp_path / "run", records)
    write.write_page(collect([folder]), tmp_path / "page.html")
    with opened(tmp_path / "page.html") as browser:
        header = browser.find_element("css selector", "header").text.splitlines()
        assert re.fullmatch(r"bands is fastest on 1 of 1 problem, by 1\.\d\dx\.", header[1])
        (badge,) = browser.find_elements("css selector", ".fastest .badge")
        assert badge.text == "oversubscribed"
        assert "ranks shared cores" in badge.get_attribute("title")


def test_charts_follow_the_window_and_toolbars_the_pointer(report: Path) -> None:
    from selenium.webdriver import ActionChains

    def measure(what: str) -> Any:
        return browser.execute_script(
            "const plot = document.querySelector('#chart-throughput .js-plotly-plot');"
            f"return {what}"
        )

    opacity = "getComputedStyle(plot.querySelector('.modebar-container')).opacity"
    with opened(report, width=1400) as browser:
        wait_for_charts(browser)
        until(lambda: measure("plot && plot.querySelector('.main-svg')"))
        assert float(measure(opacity)) == 0
        for width in (800, 420):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            until(lambda: measure(
                "plot.querySelector('.main-svg').getBoundingClientRect().width"
                " <= plot.parentElement.clientWidth"
            ))  # fmt: skip
            assert measure("document.documentElement.scrollWidth <= innerWidth")
        ActionChains(browser).move_to_element(measure("plot")).perform()
        until(lambda: float(measure(opacity)) == 1)


def test_hover_and_click(report: Path) -> None:
    from selenium.webdriver import ActionChains

    with opened(report) as browser:
        wait_for_charts(browser)
        point = browser.find_element("css selector", "#chart-throughput .plot .points path.point")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        chain = ActionChains(browser).move_to_element(point)
        chain.perform()
        hover_text = until(lambda: browser.execute_script(
            "return [...document.querySelectorAll('.hoverlayer text')]"
                ".map(t => t.textContent).join(' ')"
        ))  # fmt: skip
        assert "bands" in hover_text
        assert "1k tokens, world size 1" in hover_text
        assert "TFLOP/s" in hover_text
        chain.click().perform()
        until(lambda: browser.execute_script("return document.querySelector('dialog').open"))
        until(
            lambda: browser.execute_script(
                "return document.querySelectorAll('dialog .points path').length === 12"
            )
        )
        dialog = browser.find_element("css selector", "dialog").text
        assert "cpbench bench --operator bands --mask causal --dtype float32" in dialog
        assert ERROR in dialog  # the environment's variables
        assert complaints(browser) == []


@pytest.mark.parametrize("width", [1300, 640])
def test_nothing_is_wider_than_the_window(report: Path, width: int) -> None:
    with opened(report, width) as browser:
        client_width, scroll_width = browser.execute_script(
            "const d = document.documentElement; return [d.clientWidth, d.scrollWidth]"
        )
        assert scroll_width <= client_width


def test_light_and_dark(report: Path) -> None:
    script = "return getComputedStyle(document.body).backgroundColor"
    with opened(report) as browser:
        light = browser.execute_script(script)
    with opened(report, dark=True) as browser:
        assert browser.execute_script(script) != light
        ink = browser.execute_script("return getComputedStyle(document.body).color")
        wait_for_charts(browser)
        tick = browser.execute_script(
            "return getComputedStyle(document.querySelector('.plot .xtick text')).fill"
        )
        assert tick == ink


def test_many_samples_are_written_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "MAX_INLINE_SAMPLES", 10)
    monkeypatch.setattr(write, "CHUNK_CASES", 5)
    folder = run_directory(tmp_path / "run", sample_records())
    write.write_page(collect([folder]), tmp_path / "report.html")
    assert len(list((tmp_path / "report_samples").iterdir())) == -(-len(sample_records()) // 5)
    with opened(tmp_path / "report.html") as browser:
        browser.execute_script("document.querySelector('#table tbody tr:nth-child(7)').click()")
        until(
            lambda: browser.execute_script(
                "return document.querySelectorAll('dialog .points path').length === 12"
            )
        )
        assert complaints(browser) == []
        assert requests(browser) <= {"file", "blob", "data"}


def test_the_page_is_deterministic(report: Path, tmp_path: Path) -> None:
    write.write_page(collect([report.parent]), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_a_missing_library_is_one_line() -> None:
    with pytest.raises(ValueError, match="pip install no_such_package"):
        assets.read_package_file("no_such_package", "x.js")


def test_selectors_have_their_own_section_and_chart(tmp_path: Path, report: Path) -> None:
    records = [timed("bands", 8.0), timed("moba", 2.0), timed("oracle", 20.0)]
    for selector, recall in zip(records[1:], (0.4, 0.9), strict=True):
        selector.flags = ["approximate"]
        selector.quality = {"mass": recall, "density": 0.1, "out_error": 0.2}
        selector.parts_us = {part: [[100.0, 110.0]] for part in ("select", "plan", "kernel")}
    folder = run_directory(tmp_path / "run", records)
    write.write_page(collect([folder]), folder / "report.html")
    with opened(folder / "report.html") as browser:
        wait_for_charts(browser)
        rows = browser.execute_script(
            "return [...document.querySelectorAll('#selection tbody tr')].map(r => r.innerText)"
        )
        assert [row.split()[0] for row in rows[:2]] == ["oracle", "moba"]
        fastest = browser.execute_script("return document.getElementById('fastest').innerText")
        assert "bands" in fastest
        assert "moba" not in fastest
        browser.execute_script("document.getElementById('chart-quality').scrollIntoView()")
        points = "return document.querySelectorAll('#chart-quality .plot .points path').length"
        assert until(lambda: browser.execute_script(points)) == 3
        assert complaints(browser) == []
    with opened(report) as browser:  # without selectors
        wait_for_charts(browser)
        assert browser.execute_script("return document.getElementById('selection')") is None
        assert captions(browser, "quality") == []
