"""The tidy table as a file for programs."""

from __future__ import annotations

import io
from pathlib import Path

from cpbench.reports.collection import Collection
from cpbench.reports.columns import COLUMNS
from cpbench.results.store import write_whole


def parquet(collection: Collection, path: Path) -> None:
    """Write the tidy table as Parquet, what its columns mean in the metadata of each.

    Raises:
        ValueError: when pyarrow is not installed.
        OSError: when the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError('parquet needs pyarrow: pip install "cpbench[parquet]"') from None
    told = collection.table.assign(draw=collection.table["draw"].map(_text))
    table = pa.Table.from_pandas(told, preserve_index=False)
    fields = [field.with_metadata({"meaning": COLUMNS[field.name]}) for field in table.schema]
    schema = pa.schema(fields, metadata=table.schema.metadata)
    content = io.BytesIO()
    pq.write_table(table.cast(schema), content)
    write_whole(path, content.getvalue())


def _text(draw: object) -> str | None:
    """A seed may be a number or a text; a column is of one type."""
    return None if draw is None else str(draw)
