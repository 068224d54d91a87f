#!/usr/bin/env bash
# pyarrow 26.0.1: a CSV reader with ignore_empty_lines=False, which is how a blank line is to be noticed at all, makes a
# row of it in a file of several columns: text columns get "", numbers null. A row that is merely short, such as a lone
# separator too few, is an error ("Expected 3 columns, got 2"), so one would expect a blank line to be one as well. The
# documentation speaks of files of one column only. Damage such as a doubled newline thus becomes rows of a click log.
#
# What to do: read with ignore_empty_lines=True and compare the number of rows with the number of lines.
#
# Seen with pyarrow 26.0.1, Python 3.11: two rows and a blank line between them are read as three rows.
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import pyarrow as pa
import pyarrow.csv

strict = pyarrow.csv.ParseOptions(ignore_empty_lines=False)


def read(text):
    return pyarrow.csv.read_csv(io.BytesIO(text), parse_options=strict)


table = read(b"user,item,price\nu1,i1,3\n\nu2,i2,4\n")
print("rows of two rows and a blank line:", table.to_pydict())
try:
    read(b"user,item,price\nu1,i1,3\nu2,i2\n")
    short = "read"
except pa.ArrowInvalid as error:
    short = str(error).splitlines()[0]
print("a short row:", short)
as_seen = table.num_rows == 3 and table["item"].to_pylist() == ["i1", "", "i2"] and "Expected 3 columns, got 2" in short
print("as seen" if as_seen else "the behaviour has changed")
sys.exit(0 if as_seen else 1)
PYTHON
