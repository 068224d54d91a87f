"""Tell whether two prepared folders hold the same, whoever wrote them and into however many files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlib.data.columns import find_row_groups
from ctrlib.data.event_state import State, has_events
from ctrlib.data.quantiles import has_points, points_path
from ctrlib.data.split import SPLITS
from ctrlib.data.vocabulary import vocabulary_path
from ctrlib.manifest import check_file, load_schema
from ctrlib.schema import Schema, SchemaError


def fingerprint(folder: str | Path) -> dict[str, str]:
    """Part of a prepared folder -> 16 hexadecimal digits: schema, vocab/NAME, numbers/NAME, groups, events, its splits.

    Folders are identical where these are equal: schema.json says the same, vocabularies have the same values, ids and
    counts, numbers the same values and counts to make edges of, what is kept of a log of events is the same, and every
    split has the same columns, rows and order of rows, bit for bit. Into how many files and row groups a split is
    divided, and how these are compressed, does not count; nor does report.json. Reads row group by row group.

    Raises:
        SchemaError: it is not a prepared folder, or a part is missing.

    >>> import tempfile
    >>> import polars as pl
    >>> from ctrlib.data.prepare import prepare
    >>> folder, frame = Path(tempfile.mkdtemp()), pl.DataFrame({"item": ["a", "b"], "label": [0, 1]})
    >>> for name in ("a", "b"): _ = prepare({"train": frame}, folder / name, log=None)
    >>> list(fingerprint(folder / "a")), fingerprint(folder / "a") == fingerprint(folder / "b")
    (['schema', 'vocab/item', 'train'], True)
    """
    schema, folder = load_schema(folder), Path(folder)
    found = {"schema": _digits(json.dumps(schema.to_dict(), sort_keys=True).encode())}
    files = {f"vocab/{name}": vocabulary_path(folder / "vocab", name) for name in schema.vocabularies}
    if has_points(folder):
        files |= {f"numbers/{feature.name}": points_path(folder, feature.name) for feature in schema.dense}
    for part, path in files.items():
        if not path.is_file():
            raise SchemaError(f"{path} is missing, expected {part}: prepare the data again")
    if (folder / "groups.parquet").is_file():
        files["groups"] = folder / "groups.parquet"
    for path in files.values():
        check_file(folder, path.relative_to(folder).as_posix())
    found |= {part: _rows([path]) for part, path in files.items()}
    if has_events(schema):
        found["events"] = _events(folder, schema)
    for split in SPLITS:
        if (folder / split).is_dir():
            groups = find_row_groups(folder, split, schema)
            paths = list(dict.fromkeys(group.path for group in groups))
            for path in paths if groups[0].manifest is not None else ():
                check_file(folder, f"{split}/{path.name}")
            found[split] = _rows(paths)
    return found


def _rows(paths: list[Path]) -> str:
    columns: dict[str, list[Any]] = {}
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches():
            for name, column in zip(batch.schema.names, batch.columns):
                if column.null_count:
                    raise SchemaError(f"{path}, column {name!r} holds nulls, expected none: prepare the data again")
                buffers = _buffers(column)
                digests = columns.setdefault(f"{name}: {_kind(column.type)}", [hashlib.sha256() for _ in buffers])
                for digest, buffer in zip(digests, buffers):
                    digest.update(buffer)
    described = {name: [digest.hexdigest() for digest in digests] for name, digests in columns.items()}
    return _digits(json.dumps(described).encode())


def _events(folder: Path, schema: Schema) -> str:
    """What is kept of a log."""
    state = State.load(folder, schema)
    assert state is not None
    digest = hashlib.sha256(json.dumps([state.last, state.settled.clicks, state.settled.count]).encode())
    for name, frame in state.frames():
        digest.update(name.encode())
        for rows in frame.iter_slices(_SLICE):
            digest.update(rows.write_ndjson().encode())
    return digest.hexdigest()[:16]


_SLICE = 1 << 16


def _kind(dtype: pa.DataType) -> str:
    if pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        return f"list of {_kind(dtype.value_type)}"
    return str(dtype).removeprefix("large_").removesuffix("_view")


def _buffers(column: pa.Array) -> list[Any]:
    """A column's type and values as bytes that do not depend on where batches end."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return [column.value_lengths().to_numpy().astype(np.int64), *_buffers(column.flatten())]
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return [np.ascontiguousarray(column.to_numpy())]
    texts = [text.encode() for text in column.to_pylist()]
    return [np.array([len(text) for text in texts], np.int64), b"".join(texts)]


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
