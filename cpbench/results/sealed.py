"""JSON objects with a checksum, so that no damaged bit changes a result in silence.

The last key of every object that is written to a run directory is ``crc32``: the CRC-32 of all
bytes before it, which finds every single damaged bit.  Objects of earlier versions have none.
"""

from __future__ import annotations

import operator
import zlib
from typing import Any

import orjson

SEALED_SCHEMAS = (3,)  # versions of records whose lines all have a checksum
_KEY = b',"crc32":"'
_END = 10  # bytes: eight hexadecimal digits, quote, brace
_SEAL = len(_KEY) + _END
_MIN_DIFFERENT = 4  # bytes: fewer, and it is a damaged key


class DamagedError(ValueError):
    """Bytes that are not what was written; the message says how that shows."""


def seal(text: str) -> bytes:
    """The text of a JSON object, which has a key, with its checksum."""
    body = text.rstrip()[:-1].rstrip().encode()
    return b'%s%s%08x"}' % (body, _KEY, zlib.crc32(body))


def unseal(data: bytes) -> dict[str, Any]:
    """The JSON object of a line or file, without its checksum.

    Raises:
        DamagedError: when it is no JSON object, or not the one that was sealed.
    """
    data = data.rstrip(b"\n")
    key = data[-_SEAL:-_END]
    sealed = key == _KEY
    if sealed and data[-_END:] != b'%08x"}' % zlib.crc32(memoryview(data)[:-_SEAL]):
        raise DamagedError("its checksum does not match")
    try:
        table = orjson.loads(data)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise DamagedError("torn or damaged")
    if sealed:
        del table["crc32"]
    elif (
        "crc32" in table
        or table.get("schema") in SEALED_SCHEMAS
        or sum(map(operator.ne, key, _KEY)) < _MIN_DIFFERENT
    ):
        raise DamagedError("its checksum is missing or damaged")
    return table
