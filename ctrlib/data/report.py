"""What a preparation found: report.json, and the table that is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ctrlib.data.encode import Totals
from ctrlib.data.like import Earlier
from ctrlib.data.scan import DataError
from ctrlib.schema import Numeric, RawId, Schema, SchemaError, kind_of

Log = Callable[[Any], None]


class Report:
    """What report.json holds and the table shows."""

    def __init__(
        self, schema: Schema, reasons: Mapping[str, str], skipped: Mapping[str, Any], earlier: Earlier | None
    ) -> None:
        self._schema, self._reasons = schema, reasons
        self.content: dict[str, Any] = {
            "rows": {},
            "skipped": skipped,
            "label_mean": {},
            "missing_labels": {},
            "features": {},
        }
        for feature in schema.features:
            entry: dict[str, Any] = {"kind": kind_of(feature), "reason": reasons[feature.name]}
            if isinstance(feature, Numeric):
                entry |= {"transform": feature.transform, "missing": {}}
            elif isinstance(feature, RawId):
                entry |= {"form": feature.form, "missing": {}, "oov": {}}
            else:
                entry |= {"num_embeddings": feature.num_embeddings, "missing": {}, "oov": {}}
            self.content["features"][feature.name] = entry
        self.content["left_out"] = {name: why for name, why in reasons.items() if why.startswith("ignored")}
        self.remarks: list[str] = []
        if earlier is not None:
            self.content |= {"like": str(earlier.folder), "new_values": dict(earlier.new)}
            self.remarks += earlier.remarks
        self.content["remarks"] = self.remarks

    def add(
        self,
        split: str,
        totals: Totals,
        present_numbers: Mapping[str, int],
        label_positive: Mapping[str, str] | None,
        source: str,
    ) -> None:
        """Count a split; `source` is what to call its rows.

        Raises:
            DataError: it has no rows.
            SchemaError: the text that is to be the positive class never comes up in train.
        """
        if not totals.rows:
            raise DataError(f"{source}: {split} would have no rows: give more data, or another split")
        for name, positive in (label_positive or {}).items():
            if split == "train" and not totals.labels[name]["positive"]:
                raise SchemaError(
                    f"{source}: label {name!r} never holds {positive!r} in train: check how the positive class is "
                    "written"
                )
        self.content["rows"][split] = totals.rows
        self.content["label_mean"][split] = {
            name: counts["positive"] / counts["present"] if counts["present"] else None
            for name, counts in totals.labels.items()
        }
        self.content["missing_labels"][split] = {
            name: totals.rows - counts["present"] for name, counts in totals.labels.items()
        }
        for name, number in present_numbers.items():
            self.content["features"][name]["missing"][split] = (totals.rows - number) / totals.rows
        for name, counts in totals.ids.items():
            entry = self.content["features"][name]
            if entry["kind"] == "sequence":
                entry.setdefault("empty", {})[split] = counts["empty"] / totals.rows
                entry["missing"][split] = counts["missing"] / max(1, counts["ids"])
            else:
                entry["missing"][split] = counts["missing"] / totals.rows
            entry["oov"][split] = counts["unseen"] / max(1, counts["ids"])

    def show(self, out: Path, log: Log) -> None:
        """Log a table of all columns, what was skipped, and the remarks; `out` is the folder that was made."""
        table = Table(
            "column", "kind", "rows or transform", "missing", "oov", "why", box=box.SIMPLE_HEAD, pad_edge=False
        )
        last = list(self.content["rows"])[-1]
        for name, reason in self._reasons.items():
            entry = self.content["features"].get(name)
            if entry is None:
                table.add_row(name, "-", "", "", "", reason)
            elif entry["kind"] == "numeric":
                table.add_row(name, "numeric", entry["transform"], f"{entry['missing']['train']:.2%}", "", reason)
            else:
                shares = [f"{entry[what][split]:.2%}" for what, split in (("missing", "train"), ("oov", last))]
                if "empty" in entry:
                    shares[0] = f"{entry['empty']['train']:.2%} empty"
                rows = entry["form"] if entry["kind"] == "raw_id" else f"{entry['num_embeddings']:,}"
                table.add_row(name, entry["kind"], rows, *shares, reason)
        log(table)
        for split, counts in self.content["skipped"].items():
            for reason, number in counts.items():
                log(f"{split}: skipped {number:,} rows ({reason})")
        for split, num_rows in self.content["rows"].items():
            found = self.content["label_mean"][split]
            means = ", ".join(f"{name} {'-' if mean is None else f'{mean:.4f}'}" for name, mean in found.items())
            missing = {name: number for name, number in self.content["missing_labels"][split].items() if number}
            without = ", ".join(f"{name} {number:,}" for name, number in missing.items())
            log(f"{split}: {num_rows:,} rows, mean of labels: {means}{f'; missing: {without}' if without else ''}")
        if new := self.content.get("new_values"):
            log("new values: " + ", ".join(f"{name} {number:,}" for name, number in new.items()))
        for remark in self.remarks:
            log(escape(f"remark: {remark}"))
        log(f"prepared {out}")
