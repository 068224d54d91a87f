"""Permutation importance: how much worse a model ranks when the values of a feature come from other rows.

L. Breiman, "Random forests", Machine Learning 2001 (https://doi.org/10.1023/A:1010933404324). The features of a group
are permuted together, by one permutation: what two of them tell alike would otherwise still be told by the other. A
history and the features that share its vocabulary make a group by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ctrlib import metrics
from ctrlib._lazy import instead
from ctrlib.batch import Batch
from ctrlib.data.collate import collate
from ctrlib.data.columns import Columns
from ctrlib.errors import ArgumentError, check_whole
from ctrlib.schema import Schema, vocabulary_of
from ctrlib.schema import Sequence as History
from ctrlib.serving.predictor import Predictor
from ctrlib.training.baselines import sample_of
from ctrlib.training.evaluate import Scores, known, predict

MOST_ROWS = 20_000
REPEATS = 3
BATCH = 8192


def groups_of(schema: Schema, together: Sequence[Sequence[str]] = ()) -> list[tuple[str, ...]]:
    """Each feature; a history with what shares its vocabulary; and what is to be permuted `together`.

    Raises:
        ArgumentError: a name is no feature's.

    >>> from ctrlib.schema import Categorical
    >>> features = (Categorical("item"), Categorical("user"), History("clicked", vocabulary="item"))
    >>> groups_of(Schema(features, ("click",)), [("user", "item")])
    [('item',), ('user',), ('clicked',), ('item', 'clicked'), ('user', 'item')]
    """
    names = [feature.name for feature in schema.features]
    for group in together:
        if unknown := [name for name in group if name not in names]:
            raise ArgumentError(f"there are no features {unknown} to permute together; {instead(unknown, names)}")
    shared: dict[str, list[str]] = {}
    for feature in schema.sparse:
        shared.setdefault(vocabulary_of(feature), []).append(feature.name)
    histories = {vocabulary_of(feature) for feature in schema.sparse if isinstance(feature, History)}
    alike = [tuple(group) for vocabulary, group in shared.items() if vocabulary in histories and len(group) > 1]
    return list(dict.fromkeys([*((name,) for name in names), *alike, *(tuple(group) for group in together)]))


def permutation_importance(
    predictor: Predictor,
    folder: str | Path,
    split: str = "test",
    *,
    together: Sequence[Sequence[str]] = (),
    num_rows: int = MOST_ROWS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A line for each group of features and each label, the most important first.

    "auc_drop" is the AUC less that with permuted values, the mean of some permutations; "standard_error" is that of the
    paired test of the two on the same rows (users are independent where the schema names a group, rows otherwise; nan
    with weights), "low" and "high" its 95 % interval, and "log_loss_rise" is in nats. All is of "rows" rows.

    Args:
        predictor: the model.
        folder: a prepared folder that it can read.
        split: of it.
        together: features that are permuted together, besides alone.
        num_rows: at most; of a larger split so many are drawn.
        repeats: permutations of each group.
        seed: of the rows that are drawn, and of the permutations.

    Raises:
        SchemaError: the model was trained on data that were prepared in another way.
        ArgumentError: a name is no feature's.
    """
    check_whole(1, num_rows=num_rows, repeats=repeats)
    schema = predictor.check_prepared(folder)
    groups = groups_of(schema, together)
    draw = np.random.default_rng(seed)
    rows = sample_of(Path(folder), split, schema, num_rows, draw, with_group=schema.group is not None)
    before = _scores(predictor, rows.columns, schema)
    permutations = [draw.permutation(len(rows.places)) for _ in range(repeats)]
    found: list[dict[str, Any]] = []
    for group in groups:
        after = [_scores(predictor, permuted(rows.columns, schema, group, places), schema) for places in permutations]
        found += [_line(before, after, task, label, group) for task, label in enumerate(schema.labels)]
    return sorted(found, key=lambda line: (schema.labels.index(line["label"]), -line["auc_drop"]))


def permuted(columns: Columns, schema: Schema, names: Sequence[str], places: np.ndarray) -> Columns:
    """The same rows, but for the features of these names: of row i they are those of row `places[i]`."""
    ids, ragged, floats = columns.ids.copy(), dict(columns.ragged), columns.floats.copy()
    single = [feature.name for feature in schema.sparse if feature.name not in ragged]
    numbers = [feature.name for feature in schema.dense]
    for name in names:
        if name in ragged:
            ragged[name] = ragged[name].take(places)
        elif name in numbers:
            floats[:, numbers.index(name)] = floats[places, numbers.index(name)]
        else:
            ids[:, single.index(name)] = ids[places, single.index(name)]
    return replace(columns, ids=ids, ragged=ragged, floats=floats)


def _scores(predictor: Predictor, columns: Columns, schema: Schema) -> Scores:
    def batches() -> Iterator[Batch]:
        for start in range(0, len(columns.floats), BATCH):
            part = columns.take(np.arange(start, min(start + BATCH, len(columns.floats))))
            yield collate(part, schema, len(part.floats))

    return predict(predictor.model, batches())


def _line(before: Scores, after: Sequence[Scores], task: int, label: str, group: tuple[str, ...]) -> dict[str, Any]:
    labels, logits, users, weights = known(before, task)
    auc, loss = metrics.auc(labels, logits, weights), metrics.log_loss(labels, logits, weights)
    drops, rises, errors = [], [], []
    for scores in after:
        other = known(scores, task)[1]
        drops.append(auc - metrics.auc(labels, other, weights))
        rises.append(metrics.log_loss(labels, other, weights) - loss)
        if weights is None:
            errors.append(metrics.auc_paired_test(labels, logits, other, groups=users).standard_error)
    drop = float(np.mean(drops))
    error = float(np.mean(errors)) if errors else math.nan  # of one permutation, which is more than that of their mean
    return {
        "label": label,
        "features": " + ".join(group),
        "auc_drop": drop,
        "standard_error": error,
        "low": drop - 1.96 * error,
        "high": drop + 1.96 * error,
        "log_loss_rise": float(np.mean(rises)),
        "rows": len(labels),
    }
