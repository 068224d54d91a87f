"""The loader: a prepared split as a stream of `Batch`es, the same for every rank, worker count and restart.

An epoch is one *stream* of rows, defined by (data, seed, epoch) alone:

1. the row groups of the split are put in order (shuffled if asked) and packed into *windows* of up to `window_rows`
   rows, the most that is shuffled together and about the most that is in memory at once;
2. the rows of each window are permuted; the stream is the concatenation of the windows;
3. the stream is cut into *global batches* of `batch_size * world_size` rows; rank r takes the r-th slice of each.

So one rank with batches of 2B trains on the same rows as two ranks with batches of B, and any batch can be found from
its index without reading what comes before it: that is what makes resuming exact and cheap.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ctrlib.batch import Batch
from ctrlib.data.collate import collate
from ctrlib.data.columns import (
    Array,
    Columns,
    RowGroup,
    check_classes,
    decode,
    decode_kept,
    find_row_groups,
    keep_some_negatives,
    offsets_of,
)
from ctrlib.errors import ArgumentError, check_number, check_path, check_type
from ctrlib.manifest import data_hash, load_schema

_Span = tuple[int, int, int]  # window, first row in it, last row + 1


class Loader:
    """Batches of one split of a prepared folder; each `for` loop over it is one epoch.

    Args:
        folder: the prepared folder, with schema.json in it.
        split: "train", "valid", "test", or any other subfolder with parquet files.
        batch_size: rows per batch *and rank*.
        shuffle: a new order every epoch. This also marks training: a last batch of one row, which batch normalisation
            cannot take, then joins the batch before it, and a rank's share of the last batch is padded to two rows.
        seed: of the shuffle, which depends on (seed, epoch) only.
        rank, world_size: this process takes the rank-th of world_size slices of every global batch.
        workers: threads that build batches ahead of time (one more decodes the next window); 0 does all work in
            the calling thread. The batches are the same bit for bit.
        window_rows: rows decoded, and shuffled, together. A split of no more rows is decoded once and kept; of a larger
            one, two windows are in memory at most. A row group is never divided: one with more rows is a window by
            itself. (A batch of more rows than a window holds needs as many windows as it touches.)
        with_group: fill `Batch.group`; None does so where the schema names a group and rows are not shuffled.
        drop_last: leave out the rows that do not fill a last global batch, for training with fixed shapes.
        keep_negatives: the share of the rows with label 0 that is given, the same rows in every epoch; which, the seed
            says. For training on rare clicks, with a loss that knows of it (`ctrlib.losses.after_sampling`).

    The last global batch may be short. With one rank it is given as it is. With more, it is sliced as evenly as
    possible and short slices are padded by repeating a row with weight 0 and labels 0, so that every rank sees equally
    many rows and batches (sharded evaluation is collective: unequal counts hang).

    Iterating starts at batch 0 of the current epoch, or after `load_state_dict` where the state left off; handing out
    the last batch moves on to the next epoch. Use one iterator at a time.

    Raises:
        SchemaError: folder, schema, files or values are not as expected. Files and columns, and null counts and id
            ranges where parquet statistics tell them, are checked here; every value when it is decoded, which for a
            split of one window is before the first batch. `check` reads everything once, for larger ones.
        ValueError: an argument is out of range.

    >>> import tempfile, pyarrow, pyarrow.parquet
    >>> from ctrlib.schema import Categorical, Schema
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "train").mkdir()
    >>> Schema((Categorical("item", num_embeddings=10),), ("click",)).save(folder / "schema.json")
    >>> columns = {"item": pyarrow.array([3, 4, 5, 6], "int32"), "click": pyarrow.array([0, 1, 0, 1], "float32")}
    >>> pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train" / "0.parquet")
    >>> loader = Loader(folder, "train", batch_size=3)
    >>> [batch.sparse["item"].values().tolist() for batch in loader]
    [[3, 4, 5], [6]]
    >>> len(loader), loader.num_rows, loader.epoch
    (2, 4, 1)
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        window_rows: int = 1 << 20,
        with_group: bool | None = None,
        drop_last: bool = False,
        keep_negatives: float = 1.0,
    ) -> None:
        check_path("a prepared folder", folder=folder)
        check_type("the name of a split", str, split=split)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("workers", workers, 0),
            ("window_rows", window_rows, 1),
        ):
            check_type("a whole number", Integral, **{name: value})
            if value < least:
                raise ArgumentError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ArgumentError(f"rank must be in [0, world_size) = [0, {world_size}), got {rank}")
        self.folder, self.schema = Path(folder), load_schema(folder)
        if with_group is None:
            with_group = self.schema.group is not None and not shuffle
        if with_group and not self.schema.group:
            raise ArgumentError(f"with_group=True, but the schema of {folder} names no group: set Schema(group=...)")
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.window_rows, self.with_group = window_rows, with_group
        self.data_hash = data_hash(folder)
        self._row_groups = find_row_groups(Path(folder), split, self.schema)
        check_number(0, keep_negatives=keep_negatives)
        if not 0 < keep_negatives <= 1:
            raise ArgumentError(f"keep_negatives must be above 0 and at most 1, got {keep_negatives}")
        self.keep_negatives = keep_negatives
        if keep_negatives < 1:
            self._row_groups = keep_some_negatives(self._row_groups, self.schema, keep_negatives, seed)
        self.num_rows = sum(group.size for group in self._row_groups)
        self._global_size = batch_size * world_size
        full, tail = divmod(self.num_rows, self._global_size)
        fold = shuffle and tail == 1 and full > 0
        self._num_batches = full if drop_last or fold else full + (tail > 0)
        self._end = full * self._global_size if drop_last else self.num_rows
        if self._num_batches == 0:
            raise ArgumentError(
                f"drop_last leaves nothing: {self.num_rows} rows do not fill a batch of {self._global_size}"
            )
        self._position = 0  # batches handed out, counted from epoch 0
        self._resumed = False  # the next iterator goes on at `_position`, not at the start of its epoch
        self._kept: Columns | None = None  # the only window, if the split fits one

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self._num_batches

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; handing out the last batch adds one."""
        return self._position // self._num_batches

    def set_epoch(self, epoch: int) -> None:
        """Make the next iterator run `epoch`. Naming the current epoch changes nothing, so a resumed one goes on."""
        if epoch < 0:
            raise ArgumentError(f"epoch must be at least 0, got {epoch}")
        if epoch != self.epoch:
            self._position, self._resumed = epoch * self._num_batches, False

    def check(self) -> None:
        """Decode the whole split once, row group by row group, and throw it away: bad values are found before step 1.

        Raises:
            SchemaError: naming file, column, row, value and what was expected.
        """
        for group in self._row_groups:
            decode([group], self.schema, self.with_group)

    def check_classes(self) -> None:
        """Read labels and weights until every label has shown both of its classes, mostly one row group.

        Raises:
            DataError: no row has weight, or those that have are all of one class, so that nothing can be learnt from
                them, and no AUC is defined on them.
        """
        check_classes(self._row_groups, self.schema)

    def state_dict(self, in_flight: int = 0) -> dict[str, Any]:
        """Where to go on: the epoch and the number of its batches that were consumed.

        `in_flight`: batches handed out but not trained on yet, as in a pipeline that prefetches; they are loaded again.

        Raises:
            ValueError: `in_flight` is negative or more than was handed out.
        """
        if not 0 <= in_flight <= self._position:
            raise ArgumentError(f"in_flight must be in [0, {self._position}], the batches handed out, got {in_flight}")
        epoch, batch = divmod(self._position - in_flight, self._num_batches)
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        """What the stream depends on; a position means something only where this is the same."""
        layout = [(group.path.name, group.num_rows, group.num_bytes) for group in self._row_groups]
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "num_rows": self.num_rows,
            "schema_hash": self.schema.hash,
            "layout_hash": hashlib.sha256(json.dumps([self.data_hash, layout]).encode()).hexdigest()[:16],
            "shuffle": self.shuffle,
            "window_rows": self.window_rows,
            **({"keep_negatives": self.keep_negatives} if self.keep_negatives < 1 else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iterator start at the first batch that was not consumed; windows before it are not read.

        `world_size` may differ from the saved one if `batch_size * world_size` is the same.

        Raises:
            ValueError: the state lacks a key, or is of other data, another seed, shuffle, window or global batch size.
        """
        mine = self._identity()
        missing = sorted({"epoch", "batch", *mine} - set(state))
        if missing:
            raise ArgumentError(f"loader state lacks {missing}: it is not what `Loader.state_dict` returns")
        wrong = [
            f"{key} is {state[key]!r}, this loader's is {value!r}"
            for key, value in mine.items()
            if key not in ("batch_size", "world_size") and state[key] != value
        ]
        if state["batch_size"] * state["world_size"] != self._global_size:
            wrong.append(
                f"batch_size * world_size is {state['batch_size']} * {state['world_size']}, "
                f"this loader's is {self.batch_size} * {self.world_size}"
            )
        if not (state["epoch"] >= 0 and 0 <= state["batch"] <= self._num_batches):
            wrong.append(
                f"epoch {state['epoch']}, batch {state['batch']} is outside epochs of {self._num_batches} batches"
            )
        if wrong:
            raise ArgumentError(
                f"cannot resume: {'; '.join(wrong)}. Use the saved run's data and settings, or start anew"
            )
        self._position, self._resumed = state["epoch"] * self._num_batches + state["batch"], True

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._position -= self._position % self._num_batches
        self._resumed = False
        epoch, first = divmod(self._position, self._num_batches)
        builders: Executor = ThreadPoolExecutor(self.workers, "ctrlib-build") if self.workers else _Inline()
        decoder: Executor = ThreadPoolExecutor(1, "ctrlib-decode") if self.workers else _Inline()
        try:
            for index, batch in enumerate(self._stream(epoch, first, builders, decoder), first + 1):
                self._position = epoch * self._num_batches + index
                yield batch
        finally:  # also when the consumer breaks off or a worker raises; the decoder first, builders wait for it
            decoder.shutdown(cancel_futures=True)
            builders.shutdown(cancel_futures=True)

    def _stream(self, epoch: int, first: int, builders: Executor, decoder: Executor) -> Iterator[Batch]:
        """Batches from index `first` on, in order, built ahead in bounded number from at most two open windows."""
        plan = self._plan(epoch)
        bounds = offsets_of(np.array([sum(group.size for group in window) for window in plan]))
        ahead = 1 if self.workers else 0
        depth = 2 * self.workers + 2 if self.workers else 1
        windows: dict[int, Future[tuple[Columns, Array]]] = {}
        pending: deque[tuple[int, Future[Batch]]] = deque()  # (first window that the batch needs, the batch)
        index = first
        while index < self._num_batches or pending:
            while index < self._num_batches and len(pending) < depth:
                start, stop, num_real, size = self._slice(index)
                spans = _spans(bounds, start, stop)
                oldest = pending[0][0] if pending else spans[0][0]
                if pending and spans[-1][0] > oldest + 1:
                    break  # a third window may open only when no batch in the making needs the first
                for window in [window for window in windows if window < oldest]:
                    del windows[window]
                for window in range(spans[0][0], min(max(spans[-1][0], oldest + ahead) + 1, len(plan))):
                    if window not in windows:
                        windows[window] = decoder.submit(self._open, plan[window], epoch, window)
                pieces = [(windows[window], low, high) for window, low, high in spans]
                pending.append((spans[0][0], builders.submit(self._build, pieces, num_real, size)))
                del pieces
                index += 1
            yield pending.popleft()[1].result()

    def _plan(self, epoch: int) -> list[list[RowGroup]]:
        """The epoch's windows."""
        groups = self._row_groups
        if self.num_rows <= self.window_rows:
            return [groups]
        if self.shuffle:
            groups = [groups[position] for position in self._generator(epoch, 0).permutation(len(groups))]
        plan: list[list[RowGroup]] = []
        num_rows = self.window_rows
        for group in groups:
            if num_rows + group.size > self.window_rows:
                plan.append([])
                num_rows = 0
            plan[-1].append(group)
            num_rows += group.size
        return plan

    def _generator(self, epoch: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch, purpose))))

    def _slice(self, index: int) -> tuple[int, int, int, int]:
        """This rank's part of global batch `index`: rows [start, stop) of the stream, how many count, and its size.

        A rank for which nothing is left gets the last row, to pad with.
        """
        first = index * self._global_size
        last = self._end if index == self._num_batches - 1 else first + self._global_size
        size = -(-(last - first) // self.world_size)
        if self.shuffle and self.world_size > 1:
            size = max(size, 2)  # batch normalisation needs two rows
        start = min(first + self.rank * size, last)
        stop = min(start + size, last)
        return min(start, last - 1), max(stop, min(start, last - 1) + 1), stop - start, size

    def _open(self, groups: list[RowGroup], epoch: int, window: int) -> tuple[Columns, Array]:
        """A window's rows and the order in which the stream takes them."""
        if self.num_rows > self.window_rows:
            columns = decode_kept(groups, self.schema, self.with_group)
        else:
            columns = self._kept = self._kept or decode_kept(groups, self.schema, self.with_group)
        num_rows = len(columns.ids)
        order = self._generator(epoch, window + 1).permutation(num_rows) if self.shuffle else np.arange(num_rows)
        return columns, order

    def _build(self, pieces: list[tuple[Future[tuple[Columns, Array]], int, int]], num_real: int, size: int) -> Batch:
        """Gather the rows of one batch, repeating the last one up to `size`."""
        parts = []
        for window, start, stop in pieces:
            columns, order = window.result()
            rows = order[start:stop]
            if window is pieces[-1][0]:
                rows = np.append(rows, np.repeat(rows[-1:], size - max(num_real, 1)))
            parts.append(columns.take(rows))
        return collate(Columns.concatenate(parts), self.schema, num_real)


def _spans(bounds: Array, start: int, stop: int) -> list[_Span]:
    """Which windows the rows [start, stop) of the stream lie in, and where there.

    >>> _spans(np.array([0, 10, 15, 30]), 8, 20)
    [(0, 8, 10), (1, 0, 5), (2, 0, 5)]
    """
    window = int(np.searchsorted(bounds, start, side="right")) - 1
    spans = []
    while start < stop:
        end = min(stop, int(bounds[window + 1]))
        spans.append((window, start - int(bounds[window]), end - int(bounds[window])))
        start, window = end, window + 1
    return spans


class _Inline(Executor):
    """Runs what is submitted at once, in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised where the result is asked for, as in a thread
            future.set_exception(error)
        return future
