#!/usr/bin/env bash
# polars 2.1.0: from_arrow refuses a valid array of lists of fixed size that holds nulls if it is a part of a longer
# array which goes on after it ("validity mask length must be equal to the number of values divided by size"): Arrow
# slices share the values of the whole array, and polars compares their number with the length of the slice. A part at
# the end of the array, and one without nulls, are taken. Parts are what pyarrow gives whenever it reads in batches: a
# parquet file whose other columns are dictionaries, one for each row group, is cut there, so that the same file is read
# whole and refused in batches.
#
# What to do: copy such columns before (pyarrow.concat_arrays([array]) copies one array, and what lies in it).
#
# Seen with polars 2.1.0 and pyarrow 26.0.1, Python 3.11: refused for values of any type, and where such lists lie in
# lists or structs made of a part.
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check polars==2.1.0 pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq


def taken(rows):
    try:
        return pl.from_arrow(rows).to_series(0).to_list() == rows.column(0).to_pylist()
    except pl.exceptions.ComputeError as error:
        assert "validity mask length" in str(error)
        return False


pairs = pa.array([[True, False], None, [None, True], [False, False]], pa.list_(pa.bool_(), 2))
whole = pa.table({"pair": pairs})
found = {
    "whole": taken(whole),
    "the first two of four": taken(whole.slice(0, 2)),
    "the last two of four": taken(whole.slice(2, 2)),
    "the first two, copied": taken(pa.table({"pair": pa.concat_arrays([pairs.slice(0, 2)])})),
    "in a list of the first two": taken(pa.table({"x": pa.ListArray.from_arrays([0, 1, 2], pairs.slice(0, 2))})),
    "the first without nulls": taken(whole.slice(0, 1)),
}
file = io.BytesIO()
shops = pa.array(["a", "b", "a", "b"]).dictionary_encode()
pq.write_table(whole.append_column("shop", shops), file, row_group_size=1)
found["parquet, read whole"] = taken(pa.table(pq.read_table(file).combine_chunks()))
found["parquet, in batches"] = all(taken(batch) for batch in pq.ParquetFile(file).iter_batches())
for what, result in found.items():
    print(f"{what}: {'taken' if result else 'refused'}")
expected = [True, False, True, True, False, True, True, False]
as_seen = list(found.values()) == expected
print("as seen" if as_seen else "the behaviour has changed")
sys.exit(0 if as_seen else 1)
PYTHON
