"""Add events that have happened to what a model folder keeps of them (`ctrlib.data.event_state`)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ctrlib._target import TargetError, target
from ctrlib.data.cells import checks, without_bad_rows
from ctrlib.data.coded import read_coded
from ctrlib.data.event_state import State
from ctrlib.data.raw import RawData, in_files, paths_of
from ctrlib.data.scan import OnBadRow, check_on_bad_row
from ctrlib.errors import check_path
from ctrlib.making import new_folder
from ctrlib.manifest import load_schema, write_changed
from ctrlib.schema import Categorical, Schema, SchemaError


def update(model: str | Path, data: RawData, *, on_bad_row: OnBadRow = "raise") -> dict[str, Any]:
    """Add labelled rows to the events that a model's histories and rates are made of; its weights stay.

    All must be later than those that are known. What is kept is then, to the bit, what it would be if all had been one
    log from the beginning. The folder has the old events or the new ones, whenever this is stopped. A `Predictor` that
    is loaded already goes on with the old ones.

    Args:
        model: a model folder, as `ctr.save_model` and `ctrlib train` write it.
        data: a file as `ctr.prepare` takes it, a list of those, or a frame; of its columns those are needed that
            histories and rates are made of, the time, and the label.
        on_bad_row: "raise" at the first damaged row, or "skip": such rows are no events.

    Returns:
        "events" and "positives", how many there were; "last", the latest time (microseconds since 1970, if times are
        dates); and "skipped", how many rows were left out for which reason.

    Raises:
        SchemaError: the folder keeps no events, or a column is missing or of another type.
        DataError: a row is damaged, or not later than the events that are known.
        TargetError: the folder may not be written to, or holds the data.
        LockedError: somebody else writes into the folder; the message says who.
    """
    check_path("a model folder", model=model)
    check_on_bad_row(on_bad_row)
    model = Path(model)
    inputs = paths_of(data) if in_files(data) else []
    if model.is_dir() and not os.access(model, os.W_OK):  # said here, since there is no --out to be another
        raise TargetError(
            f"{model}: this folder may not be written to (it is read-only, or somebody else's): update a copy of it, "
            "or ask for the right to write there"
        )
    with target(model, ("model", "compressed", "search"), inputs=inputs, overwrite=True):
        schema = load_schema(model)
        state = State.load(model, schema)
        if state is None:
            raise SchemaError(f"{model} keeps no events: its data was prepared without histories or rates of a log")
        raw_format, name = schema.raw_format or {}, state.events.label or ""
        with new_folder(model, keep=True) as making:
            how = {key: raw_format.get(key) for key in ("separator", "columns")}
            missing = raw_format.get("missing_values", ("",))
            table = read_coded(data, making / "raw", name="data", missing_values=missing, on_bad_row=on_bad_row, **how)
            state.events.refuse_clashes(table.dtypes, table.name)
            if name not in table.dtypes:
                raise SchemaError(f"{table.name} has no column {name!r}, the label of the events")
            positive = raw_format.get("label_positive")
            labelled = Schema((Categorical(state.events.columns[0]),), (name,))
            missing_labels = raw_format.get("missing_labels", "raise")
            found = checks(
                labelled, table.dtypes, with_labels=True, missing_labels=missing_labels, label_positive=positive
            )
            kept = without_bad_rows(table, found, on_bad_row)
            state, log = state.read(kept, positive)
            shutil.rmtree(making / "raw")
            state = state.after(log)
            state.save(making)
            write_changed(model, making)
    return {
        "events": len(log),
        "positives": int((log.labels == 1).sum()),
        "last": state.last,
        "skipped": dict(table.skipped),
    }
