"""Cut lines of delimited text into cells and number the distinct cells of each column, over any number of blocks.

These are the loops that touch every byte of a text file, so they are compiled (by numba, once for an installation: it
keeps the result). A column has an open-addressed hash table. A cell of up to eight bytes is its own key; a longer one
has a hash for a key, and is compared with what is there byte by byte. What a thousand lines will look for is fetched
into the cache before the first of them looks: memory is slow to answer, and answers many at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from llvmlite import ir
from numba.extending import intrinsic

from ctrlib.errors import UnsupportedError

if numba.config.DISABLE_JIT:
    raise UnsupportedError("NUMBA_DISABLE_JIT is set, so that loops would not be compiled")

_TOGETHER = 512  # lines whose slots are fetched together
_NEWLINE = np.uint8(10)
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, with random-looking bits
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_LONG, _CODE = np.uint64(1 << 40), np.uint64(0xFFFFFFFF)
_compiled: Callable[[Any], Any] = numba.njit(nogil=True, cache=True)
Codes = npt.NDArray[np.int32]


def cell_ends(lines: bytes, mark: int, num_columns: int) -> Codes | None:
    """Where the cells of whole lines end, after a first entry of -1: a newline ends the last of a line.

    Args:
        lines: each ends with a newline.
        mark: the byte that separates cells; there are no quotes.
        num_columns: that every line must have.

    Returns:
        Shape (lines * columns + 1,); None if a line has another number of cells, or is blank.

    >>> cell_ends(b"b,1\\na,\\n", ord(","), 2).tolist()
    [-1, 1, 3, 5, 6]
    >>> cell_ends(b"b,1\\na\\n", ord(","), 2) is None
    True
    """
    ends = np.empty(lines.count(b"\n") * num_columns + 1, np.int32)
    return ends if _cut(np.frombuffer(lines, np.uint8), np.uint8(mark), num_columns, ends) else None


class Column:
    """The distinct cells of a column in the order of coming.

    >>> column, lines = Column(2), b"b,1\\na,1\\nb,\\n"
    >>> number_cells([column], [0], lines, cell_ends(lines, ord(","), 2), 2)[0].tolist()
    [0, 1, 0]
    >>> column.values().to_pylist()
    ['b', 'a']
    """

    def __init__(self, num_columns: int) -> None:
        room = 2 * _together(num_columns)
        # Pairs of a key and a code + 1, which is 0 where there is none, side by side: one look fetches both.
        self._slots = np.zeros(4 * room, np.uint64)
        self._starts, self._lengths = np.empty(room, np.int64), np.empty(room, np.int32)
        self._texts = np.empty(1 << 16, np.uint8)
        self._used = np.zeros(2, np.int64)  # numbers of values, and of bytes of their texts

    def __len__(self) -> int:
        return int(self._used[0])

    @property
    def num_bytes(self) -> int:
        """Of the texts of all values."""
        return int(self._used[1])

    def values(self) -> pa.Array:
        """Each distinct cell once."""
        count = len(self)
        offsets = np.append(self._starts[:count], self._used[1]).astype(np.int32)
        return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(self._texts[: self.num_bytes]))

    def number(self, data: npt.NDArray[np.uint8], ends: Codes, column: int, step: int, codes: Codes) -> None:
        """Write into `codes` the number of each line's cell; `ends` are those of at most `_together` lines."""
        count, used = self._used.tolist()
        if count + len(codes) > len(self._starts):
            self._starts, self._lengths = _longer(self._starts), _longer(self._lengths)
            slots = np.zeros(2 * len(self._slots), np.uint64)
            _place(self._slots, slots)
            self._slots = slots
        if used + int(ends[-1]) - int(ends[0]) > len(self._texts):
            self._texts = _longer(self._texts, int(ends[-1]) - int(ends[0]))
        _look_up(data, ends, column, step, self._slots, self._starts, self._lengths, self._texts, self._used, codes)


def number_cells(
    columns: Sequence[Column], which: Sequence[int], lines: bytes, ends: Codes, num_columns: int
) -> list[Codes]:
    """For each of some columns the numbers of all lines' cells; `which` they are in the lines."""
    data, num_lines, together = np.frombuffer(lines, np.uint8), (len(ends) - 1) // num_columns, _together(num_columns)
    codes = [np.empty(num_lines, np.int32) for _ in columns]
    for start in range(0, num_lines, together):
        stop = min(start + together, num_lines)
        some = ends[start * num_columns : stop * num_columns + 1]
        for column, position, made in zip(columns, which, codes):
            column.number(data, some, position, num_columns, made[start:stop])
    return codes


def warm_up() -> None:
    """Compile, or load, all that is compiled."""
    lines = b"".join(b"%d\n" % number for number in range(1 << 14))
    ends = cell_ends(lines, ord(","), 1)
    assert ends is not None
    number_cells([Column(1)], [0], lines, ends, 1)


def _together(num_columns: int) -> int:
    """How many lines are looked up in one column, then in the next, while they are in the cache."""
    return 1 << max(8, min(12, 18 - num_columns.bit_length()))


def _longer(array: npt.NDArray[Any], least: int = 0) -> npt.NDArray[Any]:
    """Twice as long, or longer by `least`."""
    longer = np.empty(max(2 * len(array), len(array) + least), array.dtype)
    longer[: len(array)] = array
    return longer


# ------------------------------------------------------------------------------------------------------------ compiled


@intrinsic  # type: ignore[untyped-decorator]
def _eight_bytes(_: Any, data: Any, place: Any) -> Any:
    """Eight bytes of an array as one number, from any place on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        start = builder.gep(array.data, [arguments[1]])
        return builder.load(builder.bitcast(start, ir.IntType(64).as_pointer()), align=1)

    return numba.uint64(data, place), build


@intrinsic  # type: ignore[untyped-decorator]
def _fetch(_: Any, data: Any, place: Any) -> Any:
    """Begin to move what is at a place of an array into the cache."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        start = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(8).as_pointer())
        numbers = [ir.IntType(32)] * 3
        kind = ir.FunctionType(ir.VoidType(), [start.type, *numbers])
        function = builder.module.declare_intrinsic("llvm.prefetch", [start.type], kind)
        builder.call(function, [start, *(one(value) for one, value in zip(numbers, (0, 3, 1)))])
        return context.get_dummy_value()

    return numba.void(data, place), build


@_compiled
def _mixed(key: Any) -> Any:
    key *= _FIRST
    return key ^ (key >> np.uint64(32))


@_compiled
def _key(data: Any, start: Any, length: Any) -> Any:
    """Of a cell: its bytes, if they fit, or a hash of them."""
    eight = np.uint64(8)
    if length > eight:
        key, last = length, start + length - eight
        for place in range(start, last, eight):
            key = _mixed(key ^ _eight_bytes(data, place)) * _SECOND
        return _mixed(key ^ _eight_bytes(data, last))
    if start + eight <= np.uint64(len(data)):
        key = _eight_bytes(data, start)
        return key & ~(_ALL << (eight * length)) if length < eight else key
    key = np.uint64(0)
    for place in range(length):
        key |= np.uint64(data[start + place]) << (eight * place)
    return key


@_compiled
def _is_same(data: Any, start: int, texts: Any, other: int, length: int) -> Any:
    """Whether two cells of more than eight bytes are equal."""
    for place in range(0, length - 8, 8):
        if _eight_bytes(data, start + place) != _eight_bytes(texts, other + place):
            return False
    return _eight_bytes(data, start + length - 8) == _eight_bytes(texts, other + length - 8)


@_compiled
def _cut(data: Any, mark: int, num_columns: int, ends: Any) -> Any:
    ends[0] = -1
    one, cells, column = np.uint64(1), np.uint64(1), 0
    for place in range(len(data)):
        byte = data[place]
        if byte == mark or byte == _NEWLINE:  # noqa: SIM109 (compiled, a tuple is slower)
            column += 1
            ends[cells] = place
            cells += one
            if byte == _NEWLINE:
                if column != num_columns or (column == 1 and ends[cells - one] - ends[cells - one - one] == 1):
                    return False
                column = 0
            elif column == num_columns:
                return False
    return cells == np.uint64(len(ends))


@_compiled
def _look_up(
    data: Any,
    ends: Any,
    first: int,
    step: int,
    slots: Any,
    starts: Any,
    lengths: Any,
    texts: Any,
    used: Any,
    codes: Any,
) -> None:
    """Write the codes of some lines' cells in one column; there is room for as many new values."""
    keys, looks = np.empty(_TOGETHER, np.uint64), np.empty(_TOGETHER, np.uint64)
    mask = np.uint64(len(slots) - 2)
    count, end = used[0], used[1]
    for begin in range(0, len(codes), _TOGETHER):
        num_lines = min(_TOGETHER, len(codes) - begin)
        cell = np.uint64(first + begin * step)
        for line in range(num_lines):
            start = np.uint64(ends[cell] + 1)
            key = _key(data, start, np.uint64(ends[cell + np.uint64(1)]) - start)
            look = (_mixed(key) >> np.uint64(7)) & mask
            keys[line], looks[line] = key, look
            _fetch(slots, look)
            cell += np.uint64(step)
        cell = np.uint64(first + begin * step)
        for line in range(num_lines):
            key, look = keys[line], looks[line]
            start = np.uint64(ends[cell] + 1)
            length = np.uint64(ends[cell + np.uint64(1)]) - start
            cell += np.uint64(step)
            # That a cell is long stands above its code: the hash of one may be the bytes of a short one.
            long = np.uint64(length > 8) << np.uint64(40)
            while True:
                found = slots[look + np.uint64(1)]
                if found == 0:
                    slots[look], slots[look + np.uint64(1)] = key, np.uint64(count + 1) | long
                    starts[count], lengths[count] = end, length
                    for place in range(np.int64(length)):
                        texts[end + place] = data[np.int64(start) + place]
                    code = count
                    count, end = count + 1, end + np.int64(length)
                    break
                if slots[look] == key and (found & _LONG) == long:
                    code = np.int64(found & _CODE) - 1
                    if not long or (
                        lengths[code] == length
                        and _is_same(data, np.int64(start), texts, starts[code], np.int64(length))
                    ):
                        break
                look = (look + np.uint64(2)) & mask
            codes[begin + line] = code
    used[0], used[1] = count, end


@_compiled
def _place(slots: Any, larger: Any) -> None:
    """Fill an empty table with what another one holds."""
    mask = np.uint64(len(larger) - 2)
    for slot in range(0, len(slots), 2):
        if slots[slot + 1] != 0:
            look = (_mixed(slots[slot]) >> np.uint64(7)) & mask
            while larger[look + np.uint64(1)] != 0:
                look = (look + np.uint64(2)) & mask
            larger[look], larger[look + np.uint64(1)] = slots[slot], slots[slot + 1]
