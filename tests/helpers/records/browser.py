"""A real browser for tests: headless Chromium, with what it complained of and asked for."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WHERE = ("chromium", "chromium-browser", "google-chrome")
READY_S = 60.0


@contextmanager
def opened(path: Path, width: int = 1300, dark: bool = False) -> Iterator[Any]:
    """A browser that shows a page of ours which says that it is ready."""
    binary, driver = (
        next(filter(None, map(shutil.which, WHERE)), None),
        shutil.which("chromedriver"),
    )
    if binary is None or driver is None:
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = binary
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking",
                 "disable-component-update", "no-first-run",
                 f"window-size={width},900"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        if dark:
            feature = {"name": "prefers-color-scheme", "value": "dark"}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(path.resolve().as_uri())
        until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
        yield browser
    finally:
        browser.quit()


def until(true: Any) -> Any:
    """What a condition gives once it holds."""
    deadline = time.monotonic() + READY_S
    while not (found := true()):
        assert time.monotonic() < deadline, "the page does not get there"
        time.sleep(0.05)
    return found


def complaints(browser: Any) -> list[str]:
    """What the console has."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: Any) -> set[str]:
    """Schemes of everything that the page asked for, and the addresses of what is not in it."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
    return {url if url.startswith("http") else url.partition(":")[0] for url in urls}
