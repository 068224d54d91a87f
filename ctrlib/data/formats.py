"""Which kind of raw file a path leads to: told by its first bytes, and where those say nothing by its name.

Text may be packed. What cannot be read is refused by its name, with what to do instead; formats of the field that are
text but no table are told by their first lines, since reading them as CSV would make one wrong column of each row.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa

from ctrlib.data.scan import DataError

Format = Literal["text", "json lines", "parquet", "arrow"]
READ = "CSV, TSV, JSON lines, parquet or Arrow"
HEAD_BYTES = 1 << 16
PARQUET = (".parquet", ".pq", ".parq")

# First bytes -> how such a file is opened.
_PACKED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda path: pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd"),
    b"\x04\x22\x4d\x18": lambda path: pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "lz4"),
}
_PACKED_NAMES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd", ".lz4")

_ARCHIVE = "an archive", "unpack it, and give the file that was in it"
_FRAME = "read it with {} and pass the frame to `ctr.prepare`, or write it as parquet"
_EXCEL = "an Excel file", _FRAME.format("pandas.read_excel")
_HDF5 = "an HDF5 file", _FRAME.format("pandas.read_hdf")
_PICKLE = "a pickle, which may run code when it is opened", _FRAME.format("pandas.read_pickle, if you trust it,")
_NUMPY = "a NumPy file", "load it with numpy.load, and pass polars.DataFrame({name: array, ...}) to `ctr.prepare`"
_SQLITE = "an SQLite database", _FRAME.format("polars.read_database")
_FEATHER1 = "a Feather file of version 1", _FRAME.format("pandas.read_feather")
_ARROWS = "a stream of Arrow batches", _FRAME.format("polars.read_ipc_stream")
_JSON = "JSON, but not of one object a line", _FRAME.format("polars.read_json") + " or as JSON lines"
_TFRECORD = "a TFRecord file", "write its examples as parquet"

# Ending -> what the file is, and what to do.
_REFUSED_NAMES = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".tgz", ".tbz2", ".txz"), _ARCHIVE),
    ".avro": ("an Avro file", _FRAME.format("polars.read_avro")),
    ".orc": ("an ORC file", _FRAME.format("pyarrow.orc.read_table")),
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".xlsb", ".ods"), _EXCEL),
    **dict.fromkeys((".h5", ".hdf", ".hdf5"), _HDF5),
    **dict.fromkeys((".pkl", ".pickle"), _PICKLE),
    **dict.fromkeys((".npz", ".npy"), _NUMPY),
    **dict.fromkeys((".sqlite", ".sqlite3", ".db"), _SQLITE),
    **dict.fromkeys((".tfrecord", ".tfrecords"), _TFRECORD),
    **dict.fromkeys((".br", ".z", ".lzo", ".snappy", ".sz"), ("packed in a way that is not known here", "unpack it")),
    ".arrows": _ARROWS,
}
_REFUSED_BYTES = {
    b"PK\x03\x04": _ARCHIVE,
    b"7z\xbc\xaf\x27\x1c": _ARCHIVE,
    b"Rar!\x1a\x07": _ARCHIVE,
    b"Obj\x01": _REFUSED_NAMES[".avro"],
    b"\xd0\xcf\x11\xe0": _EXCEL,
    b"\x89HDF\r\n": _HDF5,
    b"\x93NUMPY": _NUMPY,
    b"SQLite format 3\0": _SQLITE,
    b"FEA1": _FEATHER1,
    b"\xff\xff\xff\xff": _ARROWS,
    **{bytes([0x80, protocol]): _PICKLE for protocol in range(2, 6)},
}


def format_of(path: Path) -> Format:
    """What a file is; a folder is taken for one of parquet files.

    Raises:
        DataError: it is not there, or of a kind that is not read; the message says what to do instead.
    """
    if path.is_dir():
        return "parquet"
    if not path.exists():
        raise DataError(f"{path} does not exist: expected a {READ} file, or a folder of parquet files")
    if not path.is_file():  # a pipe, of which nothing can be read twice
        return "text"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PARQUET:
        return "parquet"
    packed = bool(suffixes) and suffixes[-1] in _PACKED_NAMES
    names = suffixes[:-1] if packed else suffixes
    ending = names[-1] if names else ""
    with unpacked(path) as stream:
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
        packed |= not isinstance(stream.raw, io.FileIO)
    if ending in _REFUSED_NAMES:
        _refuse(path, *_REFUSED_NAMES[ending])
    for first, why in _REFUSED_BYTES.items():
        if head.startswith(first):
            _refuse(path, *why)
    if head[257:262] == b"ustar":
        _refuse(path, *_ARCHIVE)
    if head.startswith((b"PAR1", b"ARROW1")) or ending in (*PARQUET, ".arrow", ".feather", ".ipc"):
        if packed:
            _refuse(path, "a packed file of columns, which cannot be read from its end", "unpack it")
        return "parquet" if head.startswith(b"PAR1") else "arrow"
    if ending in (".jsonl", ".ndjson"):
        return "json lines"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{" if ending != ".json" else (b"{", b"[")):
        if _is_object(head.removeprefix(b"\xef\xbb\xbf")):
            return "json lines"
        if ending == ".json":
            _refuse(path, *_JSON)
    return "text"


def _refuse(path: Path, what: str, instead: str) -> None:
    raise DataError(f"{path} is {what}: expected a {READ} file; {instead}")


def _is_object(head: bytes) -> bool:
    """Whether the first line is a JSON object, as far as it is there."""
    line, newline, _ = head.partition(b"\n")
    if not newline and len(head) >= 1 << 12:  # cut
        return line.lstrip().startswith(b"{")
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------- packed


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked where its first bytes say that it is packed (gzip, bzip2, xz, zstd, lz4).

    Raises:
        DataError: it is truncated or damaged, found out as it is read.
    """
    try:
        with _open(path) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be unpacked, it is truncated or damaged ({error})") from error
    except OSError as error:
        if error.errno is not None:  # of the disk; those of a codec have no number
            raise
        raise DataError(f"{path} cannot be unpacked, it is truncated or damaged ({error})") from error


def _open(path: Path) -> io.BufferedReader:
    stream = path.open("rb")
    first = stream.peek(6)
    for magic, opened in _PACKED.items():
        if first.startswith(magic):
            stream.close()
            return io.BufferedReader(cast(io.RawIOBase, opened(path)), 1 << 17)
    return stream


# ------------------------------------------------------------------------------------------------ formats of the field

_NUMBER = rb"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?"
_FOREIGN = {
    "libffm": re.compile(rb"%b(?:\s+\w+:\w+:%b)+\s*" % (_NUMBER, _NUMBER)),
    "libsvm": re.compile(rb"%b(?:\s+(?:qid|\w+):%b)+\s*(?:#.*)?" % (_NUMBER, _NUMBER)),
    "Vowpal Wabbit": re.compile(
        rb"%b(?:[ \t]+%b)*(?:[ \t]+|[ \t]*'[^\s|]*[ \t]*)\|[^\s|]*(?:[ \t|]+[^\s|]+)*\s*" % ((_NUMBER,) * 2)
    ),
}
_ATOMIC = re.compile(rb"[^\t:]+:(?:token|float)(?:_seq)?(?:\t[^\t:]+:(?:token|float)(?:_seq)?)*\r?")


def refuse_foreign(path: Path, head: bytes, separator: str | None) -> None:
    """Refuse formats of the field that are text, but no table of cells; a separator that the user gives acquits.

    >>> refuse_foreign(Path("a.txt"), b"1 3:1 7:0.5\\n0 4:1\\n", None)
    Traceback (most recent call last):
    ...
    ctrlib.data.scan.DataError: a.txt looks like a libsvm file, which is not read: convert it in a few lines, as \
docs/data.md says under "Other formats"

    Raises:
        DataError: it looks like one; the message says where the docs convert it.
    """
    lines = [line for line in head.split(b"\n")[:20] if line.strip()]
    if len(lines) > 1 and not head.endswith(b"\n"):
        lines = lines[:-1]  # may be cut
    if not lines or (separator is not None):
        return
    what = next((name for name, form in _FOREIGN.items() if all(form.fullmatch(line) for line in lines)), None)
    if _ATOMIC.fullmatch(lines[0]):
        what = "RecBole"
    counts = {line.count(b"::") for line in lines}
    if len(counts) == 1 and counts.pop() > 1 and not any(b"\t" in line for line in lines):
        what = what or "MovieLens"
    if what is not None:
        raise DataError(
            f"{path} looks like a {what} file, which is not read: convert it in a few lines, as docs/data.md says "
            'under "Other formats"'
        )
