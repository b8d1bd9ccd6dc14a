"""What a page carries with it: libraries and data, packed, so that it asks for nothing.

Plotly and DataTables come with the Python packages plotly and itables.  Everything is gzip in
base64, unpacked by the browser itself (``DecompressionStream``); scripts run from ``blob:`` URLs
under a content security policy that knows no other source.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import orjson

WEB = Path(__file__).parent / "web"


def packed(data: str | bytes) -> str:
    """Text as base64 of gzip, the same every time."""
    raw = data.encode() if isinstance(data, str) else data
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def packed_json(value: Any) -> str:
    """Plain values and numpy arrays; what is not a finite number becomes null."""
    return packed(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def library(package: str, file: str) -> bytes:
    """A file of an installed package, which stays unimported.

    Raises:
        ValueError: when the package is not there or lacks the file.
    """
    spec = importlib.util.find_spec(package)
    where = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    try:
        return (Path(where) / file).read_bytes()
    except OSError:
        raise ValueError(
            f"HTML needs the Python package {package}: pip install {package}"
        ) from None


def plotly() -> str:
    return packed(library("plotly", "package_data/plotly.min.js"))


def data_tables() -> tuple[str, str]:
    """The script, packed, and the style sheet."""
    return packed(library("itables", "html/dt_bundle.js")), library(
        "itables", "html/dt_bundle.css"
    ).decode()


def script(*names: str) -> str:
    """Some of our scripts as one."""
    return "\n".join((WEB / name).read_text() for name in names)


def policy(source: str, beside: bool) -> str:
    """The content security policy of a page whose one inline script is ``source``.

    Args:
        beside: whether scripts lie in files beside the page.
    """
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    files = " 'self' file:" if beside else ""
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' blob:{files}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
