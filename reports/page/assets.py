"""Assets embedded in a page: libraries, scripts and data, packed, so that it loads nothing.

Plotly and DataTables come with the Python packages plotly and itables.  Everything is gzip in
base64, unpacked by the browser itself (``DecompressionStream``); scripts run from ``blob:`` URLs
under a content security policy that allows no other source.
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


def pack(data: str | bytes) -> str:
    """Data as base64 of gzip, deterministic."""
    raw = data.encode() if isinstance(data, str) else data
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()


def pack_json(value: Any) -> str:
    """Plain values and numpy arrays as packed JSON; nan and infinity become null."""
    return pack(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def read_package_file(package: str, file: str) -> bytes:
    """Read a file of an installed package without importing the package.

    Raises:
        ValueError: when the package is missing or lacks the file.
    """
    spec = importlib.util.find_spec(package)
    folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    try:
        return (Path(folder) / file).read_bytes()
    except OSError:
        raise ValueError(
            f"HTML needs the Python package {package}: pip install {package}"
        ) from None


def packed_plotly() -> str:
    return pack(read_package_file("plotly", "package_data/plotly.min.js"))


def packed_data_tables() -> tuple[str, str]:
    """The script of DataTables, packed, and its style sheet."""
    return pack(read_package_file("itables", "html/dt_bundle.js")), read_package_file(
        "itables", "html/dt_bundle.css"
    ).decode()


def read_web(*names: str) -> str:
    """Concatenate files of ``web/``."""
    return "\n".join((WEB / name).read_text("utf-8") for name in names)


def security_policy(source: str, external_samples: bool) -> str:
    """The content security policy of a page whose one inline script is ``source``.

    Args:
        external_samples: whether the page loads samples from files beside it.
    """
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    files = " 'self' file:" if external_samples else ""
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' blob:{files}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
