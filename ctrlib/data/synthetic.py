"""Synthetic click data from a planted teacher: the best possible AUC and log-loss of the very rows are known.

A row's true logit is

    z = b + sum_f w_f[id_f] + sum_j u_j x_j + sum_{a<b} <v_a, v_b> + s (c / L - 1/2)

with a weight w and a vector v per id (a, b run over ids and numbers alike; a number's vector is v_j x_j), x_j the
standardised log of a number (0 if missing), and c of the L history items in the target item's cluster (no such term
without a history). The label is 1 with probability sigmoid(z), so no model does better than z in expectation, and what
z itself scores is the ceiling: the Bayes AUC and log-loss. Every term is a function of the columns alone.

Rows come in chunks that depend on (seed, chunk) only: ten million rows need no more memory than a chunk and the tables.

    python -m ctrlib.data.synthetic --preset criteo --rows 1000000 --out criteo_like
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrlib._target import TargetError
from ctrlib.errors import ArgumentError
from ctrlib.metrics import StreamingMetrics
from ctrlib.schema import Categorical, Feature, Numeric, Schema, Sequence

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

CHUNK_ROWS = 1 << 15  # part of what a seed means: another size gives other rows
NUM_CLUSTERS = 8
MEAN_LOG, SD_LOG = 1.5, 1.3  # of log(1 + number), by construction
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Teacher:
    """What to generate: features C1.. (ids as 8 hexadecimal digits), I1.. (whole numbers), history (ids of C1), label.

    `cardinalities`: size of each field's id space; ids follow p(rank r) ~ (r + 20)^-zipf_exponent, so rare ones may
    never occur. `max_history`: longest history (0: no such column). `missing_rate`: of each number. The `*_sd` say how
    much of the logit's standard deviation a part should make, roughly: a few frequent ids dominate what comes out.

    Raises:
        ValueError: a value is out of its range.

    >>> frame, logits = generate(Teacher.tiny(num_rows=3))
    >>> frame.columns
    ['label', 'I1', 'I2', 'C1', 'C2', 'C3', 'history']
    >>> frame["C1"].to_list()
    ['e35c82f5', '818b2208', '39487528']
    """

    num_rows: int
    cardinalities: tuple[int, ...]
    num_numeric: int = 0
    max_history: int = 0
    interaction_rank: int = 4
    zipf_exponent: float = 1.05
    base_rate: float = 0.25
    missing_rate: float = 0.1
    linear_sd: float = 1.0
    interaction_sd: float = 0.8
    numeric_sd: float = 0.4
    history_sd: float = 0.8
    seed: int = 2024

    def __post_init__(self) -> None:
        object.__setattr__(self, "cardinalities", tuple(self.cardinalities))
        for name, value, low, high in (
            ("num_rows", self.num_rows, 1, math.inf),
            ("number of cardinalities", len(self.cardinalities), 1, 63),
            ("smallest cardinality", min(self.cardinalities, default=1), 1, math.inf),
            ("largest cardinality", max(self.cardinalities, default=1), 1, 1 << 26),  # field and id share 32 bits
            ("num_numeric", self.num_numeric, 0, math.inf),
            ("max_history", self.max_history, 0, math.inf),
            ("interaction_rank", self.interaction_rank, 1, math.inf),
            ("base_rate", self.base_rate, 1e-6, 1 - 1e-6),
            ("missing_rate", self.missing_rate, 0, 1),
        ):
            if not low <= value <= high:
                raise ArgumentError(
                    f"{name} must be between {low} and {high}, got {value}: change the Teacher's arguments"
                )
        if self.max_history and self.cardinalities[0] < 2 * NUM_CLUSTERS:
            raise ArgumentError(
                f"histories are of C1, which needs at least {2 * NUM_CLUSTERS} ids, got {self.cardinalities[0]}: "
                "enlarge cardinalities[0] or set max_history=0"
            )

    @classmethod
    def tiny(cls, num_rows: int = 2_000, seed: int = 2024) -> Teacher:
        """Every kind of feature, small enough for unit tests."""
        return cls(num_rows, (100, 20, 5), num_numeric=2, max_history=6, seed=seed)

    @classmethod
    def criteo(cls, rows: int = 1_000_000, seed: int = 2024) -> Teacher:
        """Shaped like Criteo's display ads: 13 numbers, 26 id fields, 25.6% clicks, ~1M distinct ids in 1M rows."""
        # Criteo-Kaggle's sizes, but those above 100k are chosen so that a million rows hold about a million ids
        # fmt: off
        cardinalities = (
            1460, 583, 400_000, 250_000, 305, 24, 12_517, 633, 3, 93_145, 5683, 330_000, 3194,
            27, 14_992, 300_000, 10, 5652, 2173, 4, 340_000, 18, 15, 120_000, 105, 100_000,
        )
        # fmt: on
        return cls(
            rows,
            cardinalities,
            num_numeric=13,
            interaction_rank=6,
            base_rate=0.256,
            missing_rate=0.2,
            seed=seed,
        )

    def features(self) -> tuple[Feature, ...]:
        """The columns as schema features, in the order of the columns; the label is the column 'label'.

        >>> [feature.name for feature in Teacher.tiny().features()]
        ['I1', 'I2', 'C1', 'C2', 'C3', 'history']
        """
        features: list[Feature] = [Numeric(f"I{j + 1}", transform="log") for j in range(self.num_numeric)]
        features += [Categorical(f"C{f + 1}") for f in range(len(self.cardinalities))]
        if self.max_history:
            features.append(Sequence("history", vocabulary="C1", max_length=self.max_history))
        return tuple(features)

    def schema(self) -> Schema:
        """`features()` and the label 'label'."""
        return Schema(self.features(), ("label",))


@dataclass(frozen=True)
class _World:
    """The teacher's parameters: everything that is the same for all rows."""

    weights: tuple[npt.NDArray[np.float32], ...]  # per field (cardinality, 1 + rank): w and v of each id
    names: tuple[pl.Series, ...]  # per field: id -> 8 hexadecimal digits
    numeric: Floats  # (num_numeric, 1 + rank): u and v
    bias: float


def _rng(teacher: Teacher, *stream: int) -> np.random.Generator:
    return np.random.default_rng([teacher.seed, *stream])


@lru_cache(maxsize=1)  # 100 MB for `Teacher.criteo`
def _world(teacher: Teacher) -> _World:
    num_fields, rank = len(teacher.cardinalities), teacher.interaction_rank
    num_terms = num_fields + teacher.num_numeric
    # num_terms (num_terms - 1) / 2 products <v_a, v_b> of variance rank * v_sd^4 each
    v_sd = (2 * teacher.interaction_sd**2 / (max(1, num_terms * (num_terms - 1)) * rank)) ** 0.25
    scale = np.array([teacher.linear_sd / math.sqrt(num_fields)] + [v_sd] * rank)
    weights, names = [], []
    for field, cardinality in enumerate(teacher.cardinalities):
        table = _rng(teacher, 0, field).standard_normal((cardinality, 1 + rank), dtype=np.float32)
        weights.append(table * scale.astype(np.float32))
        digits = _mix(np.arange(cardinality, dtype=np.uint32) * np.uint32(64) + np.uint32(field)).astype(">u4")
        text = digits.tobytes().hex()
        names.append(pl.Series([text[i : i + 8] for i in range(0, len(text), 8)]))
    scale[0] = teacher.numeric_sd / math.sqrt(max(1, teacher.num_numeric))
    numeric = _rng(teacher, 1).standard_normal((teacher.num_numeric, 1 + rank)) * scale
    world = _World(tuple(weights), tuple(names), numeric, 0.0)
    # Solve the bias on rows of its own, so that it does not depend on num_rows or on which chunk is asked for first.
    pilot = np.concatenate([_draw(teacher, world, _rng(teacher, 2, part))[-1] for part in range(4)])
    low, high = -50.0, 50.0
    for _ in range(60):
        bias = (low + high) / 2
        low, high = (low, bias) if _sigmoid(pilot + bias).mean() > teacher.base_rate else (bias, high)
    return _World(world.weights, world.names, numeric, low)


def _mix(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A bijection on 32 bits (shifts and odd factors only), so that no two ids share a name."""
    for _ in range(2):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x45D9F3B)
    return x ^ (x >> np.uint32(16))


def _sigmoid(z: Floats) -> Floats:
    p: Floats = 0.5 * (1 + np.tanh(z / 2))
    return p


def _zipf(teacher: Teacher, rng: np.random.Generator, cardinality: int, shape: tuple[int, ...]) -> Ids:
    """Inverse CDF of p(r) ~ (r + 20)^-a on [0, cardinality): constant time and memory per draw."""
    power = 1 - teacher.zipf_exponent
    u = rng.random(shape)
    if abs(power) < 1e-9:
        r = 20 * (1 + cardinality / 20) ** u - 20
    else:
        low, high = 20**power, (cardinality + 20) ** power
        r = (low + u * (high - low)) ** (1 / power) - 20
    return np.clip(r.astype(np.int64), 0, cardinality - 1)


def _into_cluster(ids: Ids, cluster: Ids, cardinality: int) -> Ids:
    """The neighbouring id in the cluster; an id's cluster is its remainder, which its hashed name does not show."""
    moved = ids - ids % NUM_CLUSTERS + cluster
    return np.where(moved < cardinality, moved, moved - NUM_CLUSTERS)


def _draw(teacher: Teacher, world: _World, rng: np.random.Generator) -> tuple[list[Ids], Floats, Ids, Ids, Floats]:
    """A chunk: ids per field, numbers (nan if missing), histories padded with 0, their lengths, logits."""
    rows = CHUNK_ROWS
    ids = [_zipf(teacher, rng, cardinality, (rows,)) for cardinality in teacher.cardinalities]
    taste = rng.integers(0, NUM_CLUSTERS, rows)
    lengths = rng.integers(0, teacher.max_history + 1, rows)
    history = np.zeros((rows, teacher.max_history), dtype=np.int64)
    if teacher.max_history:
        # half of the targets and two thirds of the history are of the user's favourite cluster: matches are frequent
        ids[0] = np.where(rng.random(rows) < 1 / 2, _into_cluster(ids[0], taste, teacher.cardinalities[0]), ids[0])
        history = _zipf(teacher, rng, teacher.cardinalities[0], history.shape)
        liked = _into_cluster(history, taste[:, None], teacher.cardinalities[0])
        history = np.where(rng.random(history.shape) < 2 / 3, liked, history)
    activity = rng.normal(size=(rows, 1)) * 0.5  # shared, so that numbers are correlated
    numbers = np.floor(np.exp(MEAN_LOG + activity + rng.normal(size=(rows, teacher.num_numeric)) * 1.2))
    numbers[rng.random(numbers.shape) < teacher.missing_rate] = np.nan

    logits = np.full(rows, world.bias)
    total, squares = np.zeros((rows, teacher.interaction_rank)), np.zeros((rows, teacher.interaction_rank))
    x = np.nan_to_num((np.log1p(numbers) - MEAN_LOG) / SD_LOG, nan=0.0)
    terms = [world.weights[f][field_ids] for f, field_ids in enumerate(ids)]
    for term in terms + [x[:, j, None] * world.numeric[j] for j in range(teacher.num_numeric)]:
        logits += term[:, 0]
        total += term[:, 1:]
        squares += term[:, 1:].astype(np.float64) ** 2
    logits += (total**2 - squares).sum(axis=1) / 2  # sum over pairs = (square of the sum - sum of squares) / 2
    if teacher.max_history:
        seen = np.arange(teacher.max_history) < lengths[:, None]
        same = (seen & (history % NUM_CLUSTERS == ids[0][:, None] % NUM_CLUSTERS)).sum(axis=1)
        # the share of matches has a standard deviation of about 0.35
        logits += np.where(lengths > 0, (same / np.maximum(lengths, 1) - 0.5) * teacher.history_sd / 0.35, 0.0)
    return ids, numbers, history, lengths, logits


def chunk(teacher: Teacher, index: int) -> tuple[pl.DataFrame, Floats]:
    """Rows [index * CHUNK_ROWS, ...) and their true logits; the same whichever chunks were made before."""
    if not 0 <= index * CHUNK_ROWS < teacher.num_rows:
        raise ArgumentError(f"chunk must be in 0..{(teacher.num_rows - 1) // CHUNK_ROWS}, got {index}")
    world = _world(teacher)
    rng = _rng(teacher, 3, index)
    ids, numbers, history, lengths, logits = _draw(teacher, world, rng)
    labels = (rng.random(CHUNK_ROWS) < _sigmoid(logits)).astype(np.int8)
    columns: dict[str, pl.Series] = {"label": pl.Series(labels)}
    for j in range(teacher.num_numeric):
        columns[f"I{j + 1}"] = pl.Series(numbers[:, j]).fill_nan(None).cast(pl.Int64)
    for f, field_ids in enumerate(ids):
        columns[f"C{f + 1}"] = world.names[f].gather(field_ids)
    if teacher.max_history:
        row = np.repeat(np.arange(CHUNK_ROWS), lengths)
        events = history[np.arange(teacher.max_history) < lengths[:, None]]
        texts = pl.DataFrame({"row": row, "item": world.names[0].gather(events)})
        joined = texts.group_by("row", maintain_order=True).agg(pl.col("item").str.join("|"))
        text = np.full(CHUNK_ROWS, "", dtype=object)
        text[joined["row"].to_numpy()] = joined["item"].to_list()
        columns["history"] = pl.Series(text.tolist(), dtype=pl.String)
    rows = min(CHUNK_ROWS, teacher.num_rows - index * CHUNK_ROWS)
    return pl.DataFrame(columns).head(rows), logits[:rows]


def chunks(teacher: Teacher) -> Iterator[tuple[pl.DataFrame, Floats]]:
    """All rows in order, CHUNK_ROWS at a time, with their true logits."""
    for index in range(-(-teacher.num_rows // CHUNK_ROWS)):
        yield chunk(teacher, index)


def generate(teacher: Teacher) -> tuple[pl.DataFrame, Floats]:
    """All rows at once, with their true logits, for data that fit in memory.

    >>> frame, logits = generate(Teacher.tiny())
    >>> frame.shape, logits.shape
    ((2000, 7), (2000,))
    """
    frames, logits = zip(*chunks(teacher))
    return pl.concat(frames), np.concatenate(logits)


def oracle(teacher: Teacher) -> dict[str, float]:
    """What the true logits score on the generated rows: Bayes AUC, log-loss and so on, as in `StreamingMetrics`.

    >>> result = oracle(Teacher.tiny())
    >>> 0.7 < result["auc"] < 0.9, result["rows"]
    (True, 2000.0)
    """
    metrics = StreamingMetrics()
    for frame, logits in chunks(teacher):
        metrics.update(frame["label"].to_numpy(), logits)
    return metrics.compute()


def conflict(
    num_rows: int, *, num_tasks: int = 4, cardinality: int = 20, seed: int = 2024
) -> tuple[pl.DataFrame, Floats]:
    """Rows with tasks that are planted to be in each other's way, and their true logits (num_rows, num_tasks).

    Task t's logit is 2 s_t w[shared] + u_t[left_t] (1 + 2 v_t[right_t]): signs s_t = +1, -1, +1, ... of a field that
    all read, and a product, u and v of +1 or -1, of two fields that no other task needs. Ids are uniform. So tasks
    contradict each other in the shared field, and each needs hidden units for a product of its own: a bottom that is
    wide enough for one task alone is too narrow for all.

    Columns: label_1, ..., shared, left_1, right_1, left_2, ... with ids from 0 to `cardinality` - 1.

    Raises:
        ValueError: there is no task or no row, or fewer than two ids.

    >>> frame, logits = conflict(1000, num_tasks=2)
    >>> frame.columns
    ['label_1', 'label_2', 'shared', 'left_1', 'right_1', 'left_2', 'right_2']
    >>> logits.shape
    (1000, 2)
    """
    if min(num_rows, num_tasks) < 1 or cardinality < 2:
        raise ArgumentError(
            f"expected one or more rows and tasks and two or more ids, got num_rows={num_rows}, "
            f"num_tasks={num_tasks}, cardinality={cardinality}"
        )
    rng = np.random.default_rng([seed, num_tasks, cardinality])
    weights = rng.standard_normal(cardinality)
    weights = (weights - weights.mean()) / weights.std()
    # Half of the ids each, or a product might be known from one side.
    signs = rng.permuted(np.tile(np.arange(cardinality) % 2 * 2 - 1, (num_tasks, 2, 1)), axis=2)
    shared = rng.integers(0, cardinality, num_rows)
    sides = rng.integers(0, cardinality, (num_tasks, 2, num_rows))
    columns, logits = {"shared": shared}, np.empty((num_rows, num_tasks))
    for task, ((left, right), (u, v)) in enumerate(zip(sides, signs)):
        columns |= {f"left_{task + 1}": left, f"right_{task + 1}": right}
        logits[:, task] = 2 * (-1) ** task * weights[shared] + u[left] * (1 + 2 * v[right])
    labels = (rng.random(logits.shape) < _sigmoid(logits)).astype(np.int8)
    return pl.DataFrame({f"label_{task + 1}": labels[:, task] for task in range(num_tasks)} | columns), logits


def interests(
    num_rows: int,
    *,
    num_items: int = 200,
    num_kinds: int = 20,
    length: int = 30,
    num_interests: int = 4,
    seed: int = 2024,
) -> tuple[pl.DataFrame, Floats]:
    """Rows whose label depends on how much of a history is of the target's kind, and their true logits (num_rows,).

    No column tells the kind of an item; there are as many items of each. A history is of `num_interests` kinds in
    random shares, and half of the targets are of one of these, the others of any. The logit is w[item] + 1.5
    log(1 + c) - 1.5, with c of the `length` events of the target's kind and weights of standard deviation .3. So the
    history tells little without the target: a mean of its vectors must hold the shares of all kinds at once, while
    attention to the target (DIN, KDD 2018) needs one number.

    Columns: label, item with ids from 0 to `num_items` - 1, history, a list of such ids.

    Raises:
        ValueError: there is no row or event, or kinds are fewer than interests, or items no multiple of kinds.

    >>> frame, logits = interests(1000)
    >>> frame.columns, frame["history"].list.len().unique().to_list(), logits.shape
    (['label', 'item', 'history'], [30], (1000,))
    """
    if min(num_rows, length, num_interests) < 1 or num_kinds < num_interests or num_items % num_kinds or not num_items:
        raise ArgumentError(
            "expected one or more rows, events and interests, as many kinds as interests or more, and as many items of "
            f"each kind, got num_rows={num_rows}, length={length}, num_interests={num_interests}, "
            f"num_kinds={num_kinds}, num_items={num_items}"
        )
    rng = np.random.default_rng([seed, num_items, num_kinds, length, num_interests])
    items_of = rng.permutation(num_items).reshape(num_kinds, -1)
    weights = 0.3 * rng.standard_normal(num_items)
    kinds = rng.permuted(np.tile(np.arange(num_kinds), (num_rows, 1)), axis=1)[:, :num_interests]
    shares = rng.dirichlet(np.ones(num_interests), num_rows)
    drawn = (rng.random((num_rows, length, 1)) > shares.cumsum(axis=1)[:, None, :-1]).sum(axis=2)
    events = np.take_along_axis(kinds, drawn, axis=1)
    target = np.where(rng.random(num_rows) < 0.5, kinds[:, 0], rng.integers(0, num_kinds, num_rows))
    each = items_of.shape[1]
    history = items_of[events, rng.integers(0, each, events.shape)]
    item = items_of[target, rng.integers(0, each, num_rows)]
    logits = weights[item] + 1.5 * np.log1p((events == target[:, None]).sum(axis=1)) - 1.5
    label = (rng.random(num_rows) < _sigmoid(logits)).astype(np.int8)
    lists = pl.Series("history", history, dtype=pl.Array(pl.Int64, length)).cast(pl.List(pl.Int64))
    return pl.DataFrame({"label": label, "item": item, "history": lists}), logits


def write(
    teacher: Teacher, folder: Path, file_format: Literal["csv", "parquet"] = "csv"
) -> dict[str, dict[str, float]]:
    """Write train, valid and test (8:1:1, in order) and oracle.json chunk by chunk; return the oracle of each split.

    CSV is one file per split (train.csv), parquet a folder of parts (train/00000.parquet), so memory stays flat.

    Raises:
        FileExistsError: the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise TargetError(f"{folder} is not empty: give a new folder, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    ends = [round(teacher.num_rows * share) for share in np.cumsum(list(SPLITS.values()))]
    metrics = {split: StreamingMetrics() for split in SPLITS}
    for index, (frame, logits) in enumerate(chunks(teacher)):
        start = index * CHUNK_ROWS
        for split, first, last in zip(SPLITS, [0, *ends], ends):
            low, high = max(first - start, 0), min(last - start, len(frame))
            if low >= high:
                continue
            part = frame[low:high]
            metrics[split].update(part["label"].to_numpy(), logits[low:high])
            if file_format == "csv":
                with (folder / f"{split}.csv").open("ab") as file:
                    part.write_csv(file, include_header=file.tell() == 0)
            else:
                (folder / split).mkdir(exist_ok=True)
                part.write_parquet(folder / split / f"{index:05d}.parquet")
    result = {split: streaming.compute() for split, streaming in metrics.items()}
    (folder / "oracle.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main(
    out: Path,
    preset: Literal["criteo", "tiny"] = "criteo",
    rows: int = 1_000_000,
    seed: int = 2024,
    file_format: Literal["csv", "parquet"] = "csv",
) -> None:
    """Write a synthetic data set and print what the best possible model scores on it."""
    teacher = Teacher.criteo(rows, seed) if preset == "criteo" else Teacher.tiny(rows, seed)
    for split, result in write(teacher, out, file_format).items():
        print(f"{split:6}" + " ".join(f"{name} {value:.6g}" for name, value in result.items()))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
