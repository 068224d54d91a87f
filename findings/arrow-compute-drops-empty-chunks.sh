#!/usr/bin/env bash
# pyarrow 26.0.1: compute functions of one argument leave out the empty chunks of a ChunkedArray. Values and their order
# are right, but chunk number i of the result need not be what chunk number i of the input has become. Code that
# encodes the chunks of many files at once, and hands each file its chunk by number, gives files the codes of others.
#
# What to do: go by the lengths of the chunks, or leave empty arrays out before they are put together.
#
# Seen with pyarrow 26.0.1, Python 3.11: chunks of 1, 0 and 2 values become chunks of 1 and 2, for dictionary_encode,
# utf8_upper and cast; only empty chunks become one empty chunk.
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import pyarrow as pa
import pyarrow.compute as pc

files = pa.chunked_array([["a"], [], ["b", "a"]], pa.string())
print("chunks given:", [len(chunk) for chunk in files.chunks])
found = {
    "dictionary_encode": files.dictionary_encode(),
    "utf8_upper": pc.utf8_upper(files),
    "cast": files.cast(pa.large_string()),
}
lengths = {name: [len(chunk) for chunk in result.chunks] for name, result in found.items()}
for name, some in lengths.items():
    print(f"{name}: chunks of {some}")
as_seen = all(some == [1, 2] for some in lengths.values())
print("as seen" if as_seen else "the behaviour has changed")
sys.exit(0 if as_seen else 1)
PYTHON
