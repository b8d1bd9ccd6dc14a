"""Export of the tidy table as Parquet."""

from __future__ import annotations

import io
from pathlib import Path

from cpbench.reports.collection import Collection
from cpbench.reports.columns import COLUMNS
from cpbench.results.store import write_atomically


def write_parquet(collection: Collection, path: Path) -> None:
    """Write the tidy table as Parquet, with the meaning of each column in its metadata.

    Raises:
        ValueError: when pyarrow is not installed.
        OSError: when the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError('parquet needs pyarrow: pip install "cpbench[parquet]"') from None
    whole = collection.whole
    seeds = whole["draw"].map(_seed_text)
    table = pa.Table.from_pandas(whole.assign(draw=seeds), preserve_index=False)
    fields = [field.with_metadata({"meaning": COLUMNS[field.name]}) for field in table.schema]
    schema = pa.schema(fields, metadata=table.schema.metadata)
    content = io.BytesIO()
    pq.write_table(table.cast(schema), content)
    write_atomically(path, content.getvalue())


def _seed_text(mask_seed: object) -> str | None:
    """Mask seed as text: seeds are numbers or texts, and a column has one type."""
    return None if mask_seed is None else str(mask_seed)
