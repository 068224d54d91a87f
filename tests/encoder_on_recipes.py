"""The encoder on the data of every recipe: raw rows must give the ids, numbers and scores of the prepared folder.

    python tests/encoder_on_recipes.py --help

Each data-set script prepares its raw files. What it hands to `prepare` are the raw rows: so many of them, of test, then
of valid, then of train, go through the encoder one at a time, in one frame, in another order, as dictionaries and from
files, and must give the bits of the folder. A small model that was trained on the folder must score equal batches with
equal bits, and rows in other company within 1e-6 of a logit, or as closely as float32 allows. What differs makes the
exit code 1.
"""

from __future__ import annotations

import copy
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import polars as pl
import torch
import tyro
from numpy.typing import NDArray

import ctrlib as ctr
from ctrlib import models
from ctrlib.data.collate import collate
from ctrlib.data.columns import Columns, decode, find_row_groups
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.prepare import prepare
from ctrlib.data.split import split_table
from ctrlib.data.table import ROW, RawTable, numbered
from ctrlib.losses import binary_cross_entropy
from ctrlib.schema import MultiValued, Schema, Sequence
from ctrlib.serving.direct import Rows as DirectRows
from ctrlib.serving.predictor import Predictor, Report

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))
# Name -> the script, the folder of its raw files, and flags.
DATA_SETS: dict[str, tuple[str, str, list[str]]] = {
    "frappe": ("frappe.py", "frappe_x1", []),
    "criteo": ("criteo.py", "criteo_10k", []),
    "criteo, counts as numbers": ("criteo.py", "criteo_10k", ["--counts", "log", "--min-count", "2"]),
    "movielens_100k": ("movielens_100k.py", "movielens_100k", []),
    **{
        f"movielens_1m, {protocol}": ("movielens_1m.py", "movielens_1m", ["--protocol", protocol])
        for protocol in ("autoint", "ids", "histories", "labels")
    },
    **{
        f"amazon_grocery, {protocol}": ("amazon_grocery.py", "amazon_grocery", ["--protocol", protocol])
        for protocol in ("leave_one_out", "baskets")
    },
    **{
        f"census_income, {protocol}": ("census_income.py", "census_income_kdd", ["--protocol", protocol])
        for protocol in ("all", "hard", "numbers", "leaked")
    },
}
BATCH_SIZE = 1_000
TOLERANCE = 1e-6  # of logits, or of their size where it is above 1
Numbers: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Arguments:
    """Compare raw rows with prepared folders."""

    data_sets: tuple[str, ...] = tuple(DATA_SETS)
    """Which; those without raw files are left out, and named."""
    raw: Path = REAL
    """Folder with the folders of raw files; CTRLIB_DATA names it, too."""
    rows: int = 10_000
    """Rows of each data set to compare."""
    model: str = "dcnv2"
    """What scores them."""


@dataclass(frozen=True)
class Prepared:
    """A folder, and raw rows of it.

    `splits`: split -> its first rows as `prepare` was given them, with all columns.
    """

    folder: Path
    schema: Schema
    splits: dict[str, pl.DataFrame]

    def expected(self, split: str) -> Columns:
        """What the folder has of these rows."""
        columns = decode(find_row_groups(self.folder, split, self.schema), self.schema)
        return columns.take(np.arange(self.splits[split].height))


@dataclass(frozen=True)
class Found:
    """What came of it.

    `roads`: how the rows came -> whether their ids and numbers were those of the folder. `scores`: who scored ->
    whether equal batches had equal scores. `difference`: the largest of logits of rows in other company, over
    max(1, |logit|); `rounding`: that of the network's float32 from its float64.
    """

    roads: dict[str, bool]
    scores: dict[str, bool]
    difference: float
    rounding: float

    @property
    def wrong(self) -> list[str]:
        """The roads and scores that differ."""
        # BLAS adds up in another order for a row than for a thousand. Where terms of a logit are large and cancel, that
        # alone is more; what float32 costs anyhow tells how much more.
        close = {"logits": self.difference <= max(TOLERANCE, 2 * self.rounding)}
        return [name for name, is_same in {**self.roads, **self.scores, **close}.items() if not is_same]


def prepared(script: Path, flags: list[str], folder: Path, num_rows: int) -> Prepared:
    """Run a data-set script, and keep the raw rows that it hands to `prepare`."""
    given: dict[str, Any] = {}

    def keep(data: Any, out: Path, **options: Any) -> Schema:
        given.update(data=data, options=options)
        return prepare(data, out, **{**options, "log": None})

    flags = [*flags, "--out", str(folder)]
    with mock.patch.object(ctr, "prepare", keep), mock.patch.object(sys, "argv", [str(script), *flags]):
        runpy.run_path(str(script), run_name="__main__")
    splits: dict[str, pl.DataFrame] = {}
    for split in ("test", "valid", "train"):
        rows = _rows_of(split, given["data"], **given["options"])
        splits[split] = rows.head(num_rows - sum(frame.height for frame in splits.values()))
    splits = {split: frame for split, frame in splits.items() if frame.height}
    return Prepared(folder, Schema.load(folder), splits)


def _rows_of(split: str, data: Any, **options: Any) -> pl.DataFrame:
    """The raw rows of a split, as they are before anything is done to them."""
    if isinstance(data, Mapping):
        return pl.DataFrame(data[split].lazy().collect())
    if isinstance(data, Path):
        how: dict[str, Any] = {"separator": options["separator"], "new_columns": options["columns"]}
        data = pl.read_csv(data, has_header=False, infer_schema=False, quote_char=None, **how)
    table = RawTable((numbered(data.lazy()),), "rows")
    rows = split_table(table, (8, 1, 1), split_by=options.get("split_by"), seed=options.get("seed", 0))
    return pl.DataFrame(table.only(rows[split]).frame.drop(ROW).collect())


def compare(data: Prepared, temporary: Path, *, model: str = "dcnv2") -> Found:
    """Take the rows through every road; files are written into `temporary`."""
    encoder = Encoder.load(data.folder)
    predictor = Predictor(_trained(data, model), data.schema, data.folder)
    frame = pl.concat(data.splits.values())
    expected = Columns.concatenate([data.expected(split) for split in data.splits])
    features = frame.select(feature.name for feature in data.schema.features)
    order = np.random.default_rng(0).permutation(frame.height)
    shuffled, back = features[order.tolist()], np.argsort(order)
    roads = {
        "one by one": Columns.concatenate([encoder.transform(row)[0] for row in frame.iter_rows(named=True)]),
        "one frame": encoder.transform(frame)[0],
        "another order": encoder.transform(shuffled)[0].take(back),
        "dictionaries": encoder.transform(features.to_dicts())[0],
        "Arrow": encoder.transform(features.to_arrow())[0],
    }
    same = {name: _same(columns, expected, len(data.schema.dense)) for name, columns in roads.items()}
    for path in _files(frame, data.schema, temporary):
        same[f"transform {path.suffix}"] = _same(encoder.transform(path)[0], expected, len(data.schema.dense))
        for name, labelled in (("predict", False), ("evaluate", True)):
            groups: dict[str, int] | None = {} if labelled else None
            blocks = predictor._encoded(path, "raise", (), Report(encoder), groups=groups)
            found = Columns.concatenate([block for block, _ in blocks])
            num_numbers = expected.floats.shape[1] if labelled else len(data.schema.dense)
            same[f"{name} {path.suffix}"] = _same(found, expected, num_numbers)

    scores, logits, exact = _of_equal_batches(data, predictor)
    alone = np.concatenate([_logits(predictor, row) for row in features.iter_rows(named=True)])
    others = [alone, _logits(predictor, features), _logits(predictor, shuffled)[back]]
    with torch.inference_mode():
        few = [expected.take(np.array([row])) for row in range(0, len(alone), 10)]
        of_model = torch.cat([predictor.model(collate(row, data.schema, 1)) for row in few])
    scores["one row"] = np.array_equal(alone[::10], of_model.numpy())
    difference, rounding = max(_distance(other, logits) for other in others), _distance(logits, exact)
    return Found(same, scores, difference, rounding)


def _distance(logits: Numbers, reference: Numbers) -> float:
    return float((np.abs(logits - reference) / np.maximum(1, np.abs(reference))).max())


def _same(found: Columns, expected: Columns, num_numbers: int) -> bool:
    """To the bit: ids, lists of ids, and the first so many numbers."""
    pairs = [(found.ids, expected.ids), (_bits(found, num_numbers), _bits(expected, num_numbers))]
    for name, ragged in expected.ragged.items():
        pairs += [(found.ragged[name].values, ragged.values), (found.ragged[name].offsets, ragged.offsets)]
    return found.ragged.keys() == expected.ragged.keys() and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


def _bits(columns: Columns, num_numbers: int) -> Numbers:
    return np.ascontiguousarray(columns.floats[:, :num_numbers]).view(np.int32)


def _files(frame: pl.DataFrame, schema: Schema, folder: Path) -> Iterator[Path]:
    """The rows as files of each kind that the model reads."""
    raw_format = schema.raw_format or {}
    frame.write_parquet(folder / "rows.parquet", row_group_size=3_000)
    yield folder / "rows.parquet"
    frame.write_ndjson(folder / "rows.jsonl")
    yield folder / "rows.jsonl"
    lists = [one for one in schema.sparse if isinstance(one, MultiValued | Sequence)]
    lists = [one for one in lists if isinstance(frame.schema[one.name], pl.List)]
    texts = [pl.col(one.name).cast(pl.List(pl.String)).list.join(one.separator) for one in lists]
    has_header, separator = not raw_format["columns"], raw_format["separator"] or ","
    frame.with_columns(texts).write_csv(folder / "rows.csv", include_header=has_header, separator=separator)
    yield folder / "rows.csv"


def _trained(data: Prepared, name: str) -> torch.nn.Module:
    """A small model that has seen some of train."""
    torch.manual_seed(0)
    model = models.build({"model": name, "embedding_dim": 8, "hidden": [32, 32]}, data.schema)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _, batch in zip(range(40), Loader(data.folder, "train", batch_size=2_000, shuffle=True, workers=0)):
        optimizer.zero_grad()
        binary_cross_entropy(model(batch), batch.labels, batch.weights).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def _of_equal_batches(data: Prepared, predictor: Predictor) -> tuple[dict[str, bool], Numbers, Numbers]:
    """Whether batches of raw rows score as those of the folder; and the model's logits (rows, labels), with a network
    of float32 and of float64."""
    same, logits, exact = {"model": True, "predictor": True}, [], []
    network = copy.deepcopy(torch.nn.Sequential(predictor.model.tower, predictor.model.head)).double()
    for split, frame in data.splits.items():
        expected = data.expected(split)
        size = min(BATCH_SIZE, frame.height)
        starts = range(0, frame.height, size)
        for start, batch in zip(starts, Loader(data.folder, split, batch_size=size, workers=0)):
            rows = frame[start : start + size]
            of_folder = expected.take(np.arange(start, start + rows.height))
            of_rows = predictor.encoder.transform(rows)[0]
            with torch.inference_mode():
                encoded = collate(of_rows, data.schema, rows.height)
                logits.append(predictor.model(encoded))
                exact.append(network(predictor.model.embedding(encoded).double()))
                if predictor.model.wide is not None:
                    exact[-1] += predictor.model.wide(encoded)
                if len(batch.labels) == rows.height:  # else it holds rows that are not among those to compare
                    same["model"] &= torch.equal(predictor.model(batch), logits[-1])
            scores = predictor._probabilities(of_folder, BATCH_SIZE, Report(predictor.encoder))
            same["predictor"] &= scores.equals(predictor.predict(rows)[0])
    return same, torch.cat(logits).numpy(), torch.cat(exact).numpy()


def _logits(predictor: Predictor, rows: Any) -> Numbers:
    """What `Predictor.predict` makes probabilities of, which are exactly 1 where logits are large."""
    with torch.inference_mode():
        found: Numbers = predictor._direct(DirectRows(predictor.encoder.transform(rows)[0], predictor.schema)).numpy()
    return found


def main(arguments: Arguments) -> int:
    """Compare, and print a line for each data set.

    Raises:
        SystemExit: a data set is not known.
    """
    if unknown := sorted(set(arguments.data_sets) - set(DATA_SETS)):
        raise SystemExit(f"there are no data sets {unknown}, expected some of {list(DATA_SETS)}")
    torch.set_num_threads(1)
    failed = False
    print(f"{'data set':32}{'rows':>8}{'features':>10}{'equal':>7}{'difference of logits':>22}{'rounding':>10}")
    for name in arguments.data_sets:
        script, source, flags = DATA_SETS[name]
        if not (arguments.raw / source).is_dir():
            print(f"{name:32}no raw files: {arguments.raw / source} does not exist")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            flags = [*flags, "--raw", str(arguments.raw / source)]
            data = prepared(ROOT / "datasets" / script, flags, Path(temporary) / "prepared", arguments.rows)
            found = compare(data, Path(temporary), model=arguments.model)
        num_rows, wrong = sum(frame.height for frame in data.splits.values()), found.wrong
        is_equal = "no" if wrong else "yes"
        numbers = f"{found.difference:>22.1e}{found.rounding:>10.1e}"
        print(f"{name:32}{num_rows:>8,}{len(data.schema.features):>10}{is_equal:>7}{numbers}", *wrong, flush=True)
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
