"""An encoder that is fitted is the one of the folder that `prepare` makes of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from every_kind import EVERY_KIND, every_kind

import ctrlib as ctr
from ctrlib.data.scan import DataError
from ctrlib.data.workers import ThisMachine
from ctrlib.schema import Numeric, Schema, SchemaError, Sequence


def as_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["everything", "frame", "like", "no numbers"])
def test_what_is_fitted_is_what_prepare_writes_byte_for_byte(tmp_path: Path, form: str) -> None:
    """Although no row is encoded on the way."""
    data: Any = every_kind(tmp_path)
    options = {name: value for name, value in EVERY_KIND["random"].items() if name != "seed"}
    if form != "everything":
        # Text that is the positive class, missing labels, and more distinct numbers than points.
        data = pl.DataFrame(
            {
                "item": [None if i % 9 == 0 else f"i{i % 77}" for i in range(9_000)],
                "seen": [[f"i{i % 7}", None, f"i{i % 11}"][: i % 4] for i in range(9_000)],
                "price": [i / 4 for i in range(9_000)],
                "age": [i % 50 for i in range(9_000)],
                "label": [[None, "yes", "no"][i % 3] for i in range(9_000)],
                "user": [f"u{i % 99}" for i in range(9_000)],
            }
        )
        options = {"features": [Sequence("seen", vocabulary="item"), Numeric("price", "log")], "group": "user"}
        options |= {"missing_labels": "mask", "label_positive": {"label": "yes"}}
    if form == "no numbers":
        options |= {"features": [Sequence("seen", vocabulary="item")], "ignore": ["price", "age"]}
    if form == "like":
        ctr.prepare({"train": data}, tmp_path / "earlier", log=None, **options)
        data, options = data[:5_000], {"like": tmp_path / "earlier", "extend": True}
    ctr.prepare({"train": data}, tmp_path / "prepared", log=None, **options)
    ctr.Encoder.load(tmp_path / "prepared").save(tmp_path / "expected")
    fitted = ctr.Encoder.fit(data, **options)
    fitted.save(tmp_path / "found")
    expected = as_bytes(tmp_path / "expected")
    assert as_bytes(tmp_path / "found") == expected
    assert len(expected) == 2 + len(fitted.schema.vocabularies) + len(fitted.schema.dense)
    assert fitted.schema == Schema.load(tmp_path / "prepared")


def test_an_encoder_is_fitted_without_writing_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"item": ["a", "b", "a", "c"], "price": [1.0, 2.0, 3.0, 4.0], "label": [1, 0, 0, 1]})
    with monkeypatch.context() as patched:
        patched.setattr(ThisMachine, "write", None)
        fitted = ctr.Encoder.fit(frame)
    told: list[Any] = []
    assert ctr.Encoder.fit(frame, log=told.append).schema == fitted.schema
    assert told  # whoever wants to be told of rows has them encoded


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a,1,yes", "b,2,no"], {"label_positive": {"label": "sim"}}, r"rows.csv: label 'label' never holds 'sim' in"),
        (["a,dear,1"], {"features": [Numeric("price")], "on_bad_row": "skip"}, "rows.csv: train would have no rows"),
        (["a,1,0", "b,2,2"], {}, r"rows.csv: row 2 \(line 3 of the file\), column 'label' holds '2'"),
        (["a,1,0", "b,2,"], {}, r"rows.csv: row 2 \(line 3 of the file\), column 'label' holds None"),
    ],
)
def test_what_is_fitted_is_checked_as_by_prepare(
    tmp_path: Path, lines: list[str], options: dict[str, Any], message: str
) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["item,price,label", *lines, ""]))
    errors = []
    for read in (ctr.Encoder.fit, lambda data, **said: ctr.prepare({"train": data}, tmp_path / "p", log=None, **said)):
        with pytest.raises((DataError, SchemaError), match=message) as caught:
            read(data, **options)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]
