"""Columns of the tidy table from predictions: beside those of a measured case, or alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.results.prediction import STATUS, Prediction

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("predicted_ms", "predicted_low_ms", "predicted_high_ms", "predicted_for")


def prediction_columns(prediction: Prediction | None) -> dict[str, Any]:
    """The predicted time of a case; nothing if there is none."""
    if prediction is None:
        return {}
    return {
        "predicted_ms": prediction.milliseconds("seconds"),
        "predicted_low_ms": prediction.milliseconds("low"),
        "predicted_high_ms": prediction.milliseconds("high"),
        "predicted_for": f"{prediction.cluster} ({prediction.cluster_hash})",
    }


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """What is known of a case that was predicted and not measured, beside its own columns."""
    return {
        "status": STATUS,
        "machine": prediction.cluster,
        "flags": "",
        "competes": False,
        "disqualified": STATUS,
        "started": prediction.started,
        "writer": prediction.writer,
        **prediction_columns(prediction),
    }


def split_predicted(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows that were measured, and all with a prediction; a prediction is added to the rows of the
    same case that were measured without one, in other run directories."""
    alone = table["status"] == STATUS
    known = table[table["predicted_ms"].notna()].drop_duplicates("id", keep="last")
    measured = table[~alone].copy()
    missing = measured["predicted_ms"].isna() & measured["id"].isin(known["id"])
    for column in COLUMNS:
        values = measured["id"].map(known.set_index("id")[column])
        measured[column] = measured[column].where(~missing, values)
    only = table[alone & ~table["id"].isin(measured["id"])].drop_duplicates("id", keep="last")
    together = [measured[measured["predicted_ms"].notna()], only]
    import pandas as pd

    predicted = pd.concat([rows for rows in together if len(rows)] or [only], ignore_index=True)
    return measured.reset_index(drop=True), predicted
