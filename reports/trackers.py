"""The tidy table in the formats of experiment trackers, written by their own packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.columns import BOOLEAN_COLUMNS, TEXT_COLUMNS
from cpbench.reports.metrics import METRICS
from cpbench.reports.tables.summary import method_names

if TYPE_CHECKING:
    from cpbench.reports.collection import Collection


def write_tensorboard(collection: Collection, folder: Path) -> None:
    """Write scalars ``METRIC/METHOD, MASK, world size N`` by sequence length as event files.

    Raises:
        ValueError: without the package tensorboard.
    """
    try:
        from tensorboard.summary import Writer
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install tensorboard") from None
    table = collection.table.assign(method=method_names(collection.table))
    writer = Writer(str(folder))
    try:
        for row in table[table["status"] == "ok"].to_dict("records"):
            name = f"{row['method']}, {row['mask']}, world size {row['world_size']}"
            for column in (metric.column for metric in METRICS.values()):
                value = float(row[column])
                if value == value:
                    writer.add_scalar(
                        f"{column}/{name}", value, int(row["seq_len"]), wall_time=row["started"]
                    )
    finally:
        writer.close()


def write_wandb(collection: Collection, folder: Path) -> None:
    """Write the tidy table as an offline run, for ``wandb sync``.

    Raises:
        ValueError: without the package wandb.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb is not installed: pip install wandb") from None
    table = collection.table.drop(columns=["evidence", "notes", "log"])
    numbers = [name for name in table if name not in (*TEXT_COLUMNS, *BOOLEAN_COLUMNS)]
    texts = [name for name in table if name in TEXT_COLUMNS]
    plain = table.astype(dict.fromkeys(numbers, float))
    plain[texts] = plain[texts].map(lambda value: None if value is None else str(value))
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
    run = wandb.init(
        mode="offline", dir=str(folder), project="cpbench", name=collection.title,
        settings=settings,
    )  # fmt: skip
    try:
        run.log({"cases": wandb.Table(dataframe=plain)})
    finally:
        run.finish()


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "tensorboard": write_tensorboard, "wandb": write_wandb,
}  # fmt: skip
