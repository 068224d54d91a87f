"""What simple models make of the same rows: a constant, a logistic regression and a gradient boosting (scikit-learn's).

A result says little by itself; beside these it says whether the network was worth it. All three are fitted on rows of
train alone and scored on rows of test. By validation the regression takes its penalty and the boosting the number of
its trees, as the network takes its epoch. They need seconds, on one thread: of large data they see a sample of the
rows, and the network is compared on that of test.

Ids go to the logistic regression as one column each (a bag or a history shares 1 among its ids), numbers as they were
prepared, scaled. To the boosting, a feature of few ids goes as categories. One of many, a bag or a history, goes as two
numbers: the rate of the label among training rows with the same ids, and how often those ids came up. The rate is that
of other rows (five folds) and drawn to the mean as by 20 rows of it: an id seen once would otherwise tell the boosting
the very label of its row, and scikit-learn's `TargetEncoder(smooth="auto")` would give it 0 or 1.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib import metrics
from ctrlib.data.columns import Columns, RowGroup, decode, find_row_groups
from ctrlib.manifest import load_schema
from ctrlib.metrics.probability import sigmoid
from ctrlib.schema import Categorical, RawId, Schema
from ctrlib.training.evaluate import Scores, are_known, unless_uniform

MOST_ROWS = 200_000  # of train, and of test; of validation a quarter
NUM_PARTS = 16  # row groups that a sample is taken from
CATEGORIES = 16  # of a feature, up to which the boosting gets them as such: with more of them it overfits
NUM_FOLDS = 5
PRIOR_ROWS = 20.0  # of the mean rate, added to the rows of an id
MAX_TREES = 150
INVERSE_PENALTIES = (0.03, 0.3, 3.0)  # scikit-learn's C
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Split:
    """Some rows of a split: where they stand in it, and what they hold; labels (B, T), weights (B,)."""

    places: Array
    columns: Columns
    labels: Array
    weights: Array
    num_rows: int  # of the whole split


def compare(
    folder: str | Path, scores: Scores, *, name: str = "model", seed: int = 0, most_rows: int = MOST_ROWS
) -> list[dict[str, Any]]:
    """A line for the model and each of the baselines, of each label: how good they are on the same rows of test.

    Each line has "label", "name", "auc", "log_loss" (nats), "normalized_entropy" and "calibration" on "rows" rows of
    test, and how many "train_rows" it learnt from. Lines of baselines have "seconds", and, of the model's AUC minus
    theirs, "difference", "difference_se" and "p_value" of a paired test by DeLong, which are nan where a class has
    fewer than two rows, or weights differ. Where the rows drawn from train hold one class of a label only, the model's
    line stands alone.

    Args:
        folder: the prepared folder.
        scores: the model's, for all rows of test in their order.
        name: what to call the model.
        seed: of the samples and of the folds.
        most_rows: of train and of test; of larger data, so many are drawn.
    """
    from threadpoolctl import threadpool_limits

    folder, schema = Path(folder), load_schema(folder)
    draw = np.random.default_rng(seed)
    train = sample_of(folder, "train", schema, most_rows, draw)
    valid = sample_of(folder, "valid", schema, most_rows // 4, draw)
    test = sample_of(folder, "test", schema, most_rows, draw)
    lines: list[dict[str, Any]] = []
    with threadpool_limits(1):  # threads that wait for each other on a busy machine take twenty times as long
        for task, label in enumerate(schema.labels):
            logits = scores.logits[test.places, task]
            lines += _of_label(train, valid, test, schema, task, label, logits, name, seed)
    return lines


def remarks(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What is to be said of a comparison: that the model is worse than a constant, or not better than a baseline.

    >>> model = {"label": "click", "name": "fm", "auc": 0.7, "log_loss": 0.5, "normalized_entropy": 0.9}
    >>> other = {**model, "name": "gradient boosting", "difference": -0.01, "difference_se": 0.002, "p_value": 1e-6}
    >>> constant = {**other, "name": "constant", "log_loss": 0.6, "difference": 0.2, "p_value": 0.0}
    >>> remarks([model, constant, other])
    ['fm ranks worse than gradient boosting: AUC 0.0100 lower, with a standard error of 0.0020']
    """
    said = []
    labels = list(dict.fromkeys(line["label"] for line in lines))
    for label in labels:
        model, *others = (line for line in lines if line["label"] == label)
        of_label = f" at {label}" if len(labels) > 1 else ""
        entropy = model["normalized_entropy"]
        if others and (entropy >= 1 or model["log_loss"] >= others[0]["log_loss"]):
            said.append(
                f"{model['name']} is worse than a constant{of_label}: log-loss {model['log_loss']:.5f}, that of the "
                f"base rate of train {others[0]['log_loss']:.5f}"
            )
        for other in others:
            difference, error = other["difference"], other["difference_se"]
            how = f"AUC {abs(difference):.4f} {'lower' if difference < 0 else 'higher'}"
            if not math.isnan(error):
                how += f", with a standard error of {error:.4f}"
            if difference < 0 and (math.isnan(error) or other["p_value"] < 0.05):
                said.append(f"{model['name']} ranks worse than {other['name']}{of_label}: {how}")
            elif difference <= 0 or (not math.isnan(error) and other["p_value"] >= 0.05):
                said.append(f"{model['name']} cannot be told apart from {other['name']}{of_label}: {how}")
    return said


# ---------------------------------------------------------------------------------------------------------------- rows


def sample_of(
    folder: Path, split: str, schema: Schema, most: int, draw: np.random.Generator, *, with_group: bool = False
) -> Split:
    """All rows of a split, or so many, drawn from some of its row groups that lie evenly in it."""
    groups = find_row_groups(folder, split, schema)
    starts = np.cumsum([0, *(group.num_rows for group in groups)])
    total = int(starts[-1])
    if total <= most:
        places, columns = np.arange(total), decode(groups, schema, with_group)
    else:
        chosen = _spread(groups, starts, most)
        inside = sum(groups[place].num_rows for place in chosen)
        pieces = []
        for place in chosen:
            num_rows = groups[place].num_rows
            rows = np.sort(draw.choice(num_rows, max(1, num_rows * most // inside), replace=False))
            pieces.append((starts[place] + rows, decode([groups[place]], schema, with_group).take(rows)))
        places = np.concatenate([rows for rows, _ in pieces])
        columns = Columns.concatenate([part for _, part in pieces])
    first = len(schema.dense)
    labels = columns.floats[:, first : first + len(schema.labels)]
    weights = columns.floats[:, -1] if schema.weight else np.ones(len(labels), np.float32)
    return Split(places, columns, labels, weights, total)


def _spread(groups: Sequence[RowGroup], starts: Array, most: int) -> list[int]:
    """Places of row groups, evenly spread, that hold `most` rows."""
    count = min(len(groups), NUM_PARTS)
    while True:
        chosen = sorted({int(place) for place in np.linspace(0, len(groups) - 1, count).round()})
        if sum(groups[place].num_rows for place in chosen) >= most:
            return chosen
        count += 1


# -------------------------------------------------------------------------------------------------------------- models


def _of_label(
    train: Split,
    valid: Split,
    test: Split,
    schema: Schema,
    task: int,
    label: str,
    logits: Array,
    name: str,
    seed: int,
) -> Iterator[dict[str, Any]]:
    is_drawn, num_rows = len(train.places) < train.num_rows, train.num_rows
    train, valid, test_known = (_known(split, task) for split in (train, valid, test))
    logits = logits[are_known(test.labels[:, task], test.weights)]
    y, w = test_known.labels[:, task], _weights(test_known)
    common = {"label": label, "rows": len(y), "train_rows": num_rows if is_drawn else len(train.labels)}

    def measured(z: Array) -> dict[str, float]:
        return {
            "auc": metrics.auc(y, z, w),
            "log_loss": metrics.log_loss(y, z, w),
            "normalized_entropy": metrics.normalized_entropy(y, z, w),
            "calibration": metrics.calibration(y, sigmoid(z), w),
        }

    of_model = measured(logits)
    yield {**common, "name": name, **of_model}
    if len(np.unique(train.labels[:, task])) < 2:  # a sample of very rare clicks may hold none
        return
    for kind, fitted in (
        ("constant", _constant),
        ("logistic regression", _logistic_regression),
        ("gradient boosting", _gradient_boosting),
    ):
        started = time.perf_counter()
        z = fitted(train, valid, test_known, schema, task, seed)
        seconds = round(time.perf_counter() - started, 2)
        scored = measured(z)
        paired = metrics.auc_paired_test(y, logits.astype(np.float64), z) if w is None else None
        yield {
            **{**common, "train_rows": len(train.labels), "name": kind, **scored, "seconds": seconds},
            "difference": of_model["auc"] - scored["auc"],
            "difference_se": math.nan if paired is None else paired.standard_error,
            "p_value": math.nan if paired is None else paired.p_value,
        }


def _known(split: Split, task: int) -> Split:
    """Its rows with weight whose label is known."""
    known = are_known(split.labels[:, task], split.weights)
    if known.all():
        return split
    rows = np.flatnonzero(known)
    return Split(split.places[rows], split.columns.take(rows), split.labels[rows], split.weights[rows], split.num_rows)


def _weights(split: Split) -> Array | None:
    """In float64; None where all are alike."""
    weights = unless_uniform(split.weights)
    return None if weights is None else weights.astype(np.float64)


def _constant(train: Split, valid: Split, test: Split, schema: Schema, task: int, seed: int) -> Array:
    rate = float(np.average(train.labels[:, task], weights=train.weights))
    return np.full(len(test.labels), math.log(rate / (1 - rate)))


def _logistic_regression(train: Split, valid: Split, test: Split, schema: Schema, task: int, seed: int) -> Array:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x_train, x_valid, x_test = _one_hot(train, (valid, test), schema)
    model = LogisticRegression(max_iter=100, tol=1e-3, warm_start=True)
    found: list[tuple[float, Array]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 100 steps it is good enough to stand beside
        for penalty in INVERSE_PENALTIES:
            model.set_params(C=penalty).fit(x_train, train.labels[:, task], sample_weight=_weights(train))
            loss = metrics.log_loss(valid.labels[:, task], model.decision_function(x_valid), _weights(valid))
            found.append((loss, model.decision_function(x_test)))
    return min(found, key=lambda one: one[0])[1]


def _one_hot(train: Split, others: Sequence[Split], schema: Schema) -> list[Any]:
    """A sparse column for each id that train holds, and one for each number, scaled by train; of train and others."""
    from scipy import sparse

    splits = (train, *others)
    blocks: list[list[Any]] = [[] for _ in splits]
    for lists in zip(*(_lists(split, schema) for split in splits), strict=True):
        values = np.unique(lists[0][0])
        for some, (ids, offsets) in zip(blocks, lists, strict=True):
            places, known = _places(values, ids)
            lengths = np.diff(offsets)
            shares = known / np.repeat(np.maximum(lengths, 1), lengths)
            shape = (len(lengths), max(1, len(values)))
            some.append(sparse.csr_matrix((shares, places.astype(np.int32), offsets), shape=shape))
    if schema.dense:
        numbers = [split.columns.floats[:, : len(schema.dense)].astype(np.float64) for split in splits]
        mean, sd = numbers[0].mean(0), numbers[0].std(0)
        for some, own in zip(blocks, numbers, strict=True):
            some.append(sparse.csr_matrix((own - mean) / np.where(sd > 0, sd, 1)))
    return [sparse.hstack(some, format="csr") for some in blocks]


def _places(values: Array, ids: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Where ids stand among ascending values, and whether they do: ids that train does not have stand anywhere.

    >>> _places(np.array([3, 7]), np.array([7, 5, 9]))
    (array([1, 1, 1]), array([ True, False, False]))
    """
    if not len(values):
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
    places = np.minimum(np.searchsorted(values, ids), len(values) - 1)
    return places, values[places] == ids


def _lists(split: Split, schema: Schema) -> Iterator[tuple[Array, Array]]:
    """Ids and offsets of each feature of ids, one id a row or several."""
    single = 0
    every = np.arange(len(split.labels) + 1)
    for feature in schema.sparse:
        if isinstance(feature, Categorical | RawId):
            yield split.columns.ids[:, single], every
            single += 1
        else:
            ragged = split.columns.ragged[feature.name]
            yield ragged.values, ragged.offsets


def _gradient_boosting(train: Split, valid: Split, test: Split, schema: Schema, task: int, seed: int) -> Array:
    from sklearn.ensemble import HistGradientBoostingClassifier

    splits = (train, valid, test)
    fold = np.random.default_rng(seed).integers(NUM_FOLDS, size=len(train.labels))
    of_splits: tuple[list[Array], ...] = tuple(
        [split.columns.floats[:, place] for place in range(len(schema.dense))] for split in splits
    )
    categorical = [False] * len(schema.dense)
    for feature, *lists in zip(schema.sparse, *(_lists(split, schema) for split in splits), strict=True):
        single, size = isinstance(feature, Categorical), feature.num_embeddings
        few = single and size is not None and size <= CATEGORIES
        categorical += [True] if few else [False, False]
        made = [[ids] for ids, _ in lists] if few else _rates(train.labels[:, task], train.weights, fold, lists)
        for columns, some in zip(of_splits, made, strict=True):
            columns += some
    x_train, x_valid, x_test = (np.stack(columns, axis=1).astype(np.float32) for columns in of_splits)
    model = HistGradientBoostingClassifier(
        max_iter=MAX_TREES, early_stopping=False, categorical_features=categorical, random_state=seed
    )
    model.fit(x_train, train.labels[:, task], sample_weight=_weights(train))
    y, w = valid.labels[:, task], _weights(valid)
    losses = [metrics.log_loss(y, z.ravel(), w) for z in model.staged_decision_function(x_valid)]
    best = int(np.argmin(losses))
    return np.asarray(next(islice(model.staged_decision_function(x_test), best, None))).ravel()


def _rates(labels: Array, weights: Array, fold: Array, lists: Sequence[tuple[Array, Array]]) -> list[list[Array]]:
    """For train and other splits: the smoothed rate of the label among rows with the same ids, and how many there are.

    For rows of train, it is that of the other folds. Of several ids it is the mean; without any, the mean of train.
    """
    ids, offsets = lists[0]
    row = np.repeat(np.arange(len(labels)), np.diff(offsets))
    values, places = np.unique(ids, return_inverse=True)
    mean = float(np.average(labels, weights=weights))
    shape = (len(values), NUM_FOLDS)
    cell = places * NUM_FOLDS + fold[row]
    counts = np.bincount(cell, weights[row], minlength=shape[0] * shape[1]).reshape(shape)
    clicks = np.bincount(cell, (weights * labels)[row], minlength=shape[0] * shape[1]).reshape(shape)
    all_counts, all_clicks = counts.sum(1), clicks.sum(1)

    def of_rows(clicks: Array, counts: Array, ends: Array) -> list[Array]:
        rates = (clicks + PRIOR_ROWS * mean) / (counts + PRIOR_ROWS)
        lengths = np.diff(ends)
        held = np.repeat(np.arange(len(lengths)), lengths)
        means = [np.bincount(held, each, minlength=len(lengths)) / np.maximum(lengths, 1) for each in (rates, counts)]
        return [np.where(lengths > 0, means[0], mean), means[1]]

    cells = (clicks.ravel()[cell], counts.ravel()[cell])
    made = [of_rows(all_clicks[places] - cells[0], all_counts[places] - cells[1], offsets)]
    for other_ids, other_offsets in lists[1:]:
        place, known = _places(values, other_ids)
        if not len(values):
            place, all_clicks, all_counts = np.zeros(len(other_ids), np.int64), np.zeros(1), np.zeros(1)
        made.append(of_rows(all_clicks[place] * known, all_counts[place] * known, other_offsets))
    return made
