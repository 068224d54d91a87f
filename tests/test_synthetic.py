"""The planted teacher: its ceiling is real, and its rows depend on nothing but the teacher."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ctrlib.data import synthetic
from ctrlib.data.synthetic import CHUNK_ROWS, Teacher, chunk, chunks, generate, oracle, write
from ctrlib.metrics import auc, auc_delong, log_loss
from ctrlib.schema import Categorical, Numeric, Sequence, vocabulary_of

NUM_ROWS = CHUNK_ROWS + 7_000  # two chunks, the last one cut


@pytest.fixture(scope="module")
def tiny():
    teacher = Teacher.tiny(NUM_ROWS)
    return teacher, *generate(teacher)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def test_labels_are_drawn_from_the_logits(tiny):
    _, frame, logits = tiny
    labels, p = frame["label"].to_numpy(), sigmoid(logits)
    # in every tenth of the rows by logit, the clicks are within four standard errors of what was promised
    for rows in np.array_split(np.argsort(logits), 10):
        error = math.sqrt((p[rows] * (1 - p[rows])).sum())
        assert abs(labels[rows].sum() - p[rows].sum()) < 4 * error


def test_bayes_auc_and_log_loss_are_what_the_logits_promise(tiny):
    teacher, frame, logits = tiny
    labels, p = frame["label"].to_numpy(), sigmoid(logits)
    result, measured = oracle(teacher), auc_delong(labels, logits)
    assert result["auc"] == pytest.approx(measured.auc, abs=5e-6)
    # every row is a positive with weight p and a negative with weight 1 - p: the expectation over labels
    both = np.repeat([1, 0], len(p))
    expected = auc(both, np.tile(logits, 2), np.concatenate([p, 1 - p]))
    assert abs(measured.auc - expected) < 4 * measured.standard_error
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    error = math.sqrt((p * (1 - p) * logits**2).sum()) / len(p)
    assert abs(result["log_loss"] - entropy.mean()) < 4 * error


def test_nothing_beats_the_true_logits(tiny):
    _, frame, logits = tiny
    labels = frame["label"].to_numpy()
    rng = np.random.default_rng(0)
    best, best_loss = auc(labels, logits), log_loss(labels, logits)
    assert 0.75 < best < 0.88
    assert abs(auc(labels, rng.permutation(logits)) - 0.5) < 0.02
    for other in (logits + rng.normal(size=len(logits)) * 0.3, logits * 1.3, logits + 0.3, np.round(logits)):
        assert auc(labels, other) <= best + 1e-12
        assert log_loss(labels, other) > best_loss


@pytest.mark.parametrize("part", ["linear_sd", "interaction_sd", "numeric_sd", "history_sd"])
def test_every_part_of_the_teacher_carries_signal(part, tiny):
    teacher, _, logits = tiny
    without = dataclasses.replace(teacher, num_rows=5_000, **{part: 0.0})
    assert generate(without)[1].std() < logits.std() - 0.03


def test_the_logit_is_a_function_of_the_columns():
    # few enough combinations that rows repeat: equal columns must have equal logits
    teacher = Teacher(20_000, (16, 3), num_numeric=1, max_history=1)
    frame, logits = generate(teacher)
    columns = [feature.name for feature in teacher.features()]
    spread = (
        frame.with_columns(z=pl.Series(logits)).group_by(columns).agg(pl.len(), d=pl.col("z").max() - pl.col("z").min())
    )
    assert spread["len"].max() > 10
    assert spread["d"].max() < 1e-9


@pytest.mark.parametrize("base_rate", [0.5, 0.03])
def test_base_rate(base_rate):
    teacher = dataclasses.replace(Teacher.tiny(CHUNK_ROWS), base_rate=base_rate)
    frame, logits = generate(teacher)
    assert sigmoid(logits).mean() == pytest.approx(base_rate, rel=0.03)
    assert frame["label"].mean() == pytest.approx(base_rate, rel=0.08)


def test_rows_depend_on_the_teacher_only(tiny):
    teacher, frame, logits = tiny
    last, last_logits = chunk(teacher, 1)  # in another order, from tables built anew
    synthetic._world.cache_clear()
    first, first_logits = chunk(teacher, 0)
    assert_frame_equal(pl.concat([first, last]), frame)
    assert np.array_equal(np.concatenate([first_logits, last_logits]), logits)
    assert_frame_equal(generate(dataclasses.replace(teacher, num_rows=500))[0], frame.head(500))
    other = generate(dataclasses.replace(teacher, num_rows=500, seed=1))[0]
    assert not other["label"].equals(frame["label"].head(500))
    assert [len(part) for part, _ in chunks(teacher)] == [CHUNK_ROWS, 7_000]
    with pytest.raises(ValueError, match=r"chunk must be in 0..1, got 2"):
        chunk(teacher, 2)


@pytest.mark.parametrize("file_format", ["csv", "parquet"])
def test_written_splits_are_the_generated_rows(file_format, tmp_path, tiny):
    teacher, frame, logits = tiny
    result = write(teacher, tmp_path / "out", file_format)
    parts = []
    for split in ("train", "valid", "test"):
        if file_format == "csv":
            path = tmp_path / "out" / f"{split}.csv"
            parts.append(pl.read_csv(path, schema=frame.schema).with_columns(pl.col("history").fill_null("")))
        else:
            parts.append(pl.read_parquet(tmp_path / "out" / split / "*.parquet"))
    assert_frame_equal(pl.concat(parts), frame)
    sizes = [len(part) for part in parts]
    assert sizes[1] == pytest.approx(NUM_ROWS / 10, abs=1) and sizes[2] == pytest.approx(NUM_ROWS / 10, abs=1)
    assert [result[split]["rows"] for split in ("train", "valid", "test")] == sizes
    test_rows = slice(sizes[0] + sizes[1], None)
    assert result["test"]["auc"] == pytest.approx(
        auc(frame["label"].to_numpy()[test_rows], logits[test_rows]), abs=1e-5
    )
    assert json.loads((tmp_path / "out" / "oracle.json").read_text()) == result
    with pytest.raises(FileExistsError, match="is not empty: give a new folder"):
        write(teacher, tmp_path / "out", file_format)


def test_columns_are_the_features(tiny):
    teacher, frame, _ = tiny
    features = teacher.features()
    assert ["label"] + [feature.name for feature in features] == frame.columns
    kinds = [type(feature) for feature in features]
    assert kinds == [Numeric] * 2 + [Categorical] * 3 + [Sequence]
    schema = teacher.schema()
    assert schema.labels == ("label",) and schema.features == features
    history = schema["history"]
    assert isinstance(history, Sequence) and vocabulary_of(history) == "C1" and history.max_length == 6
    assert frame["I1"].null_count() / len(frame) == pytest.approx(0.1, abs=0.01)
    assert frame["I1"].dtype == pl.Int64 and frame["I1"].min() == 0
    events = frame["history"].str.split("|").list.explode().drop_nulls()
    lengths = frame["history"].str.count_matches(r"[0-9a-f]{8}")
    assert sorted(lengths.unique()) == list(range(7))
    assert set(events.unique()) - {""} <= set(frame["C1"].unique())


def test_names_of_ids_are_distinct_across_fields():
    names = [synthetic._world(Teacher.tiny()).names[f].to_list() for f in range(3)]
    together = list(itertools.chain(*names))
    assert len(set(together)) == len(together) == 125
    assert all(len(name) == 8 and int(name, 16) >= 0 for name in together)


def test_criteo_preset():
    teacher = Teacher.criteo(rows=20_000)
    frame, _ = generate(teacher)
    assert len(teacher.features()) == 39 and frame.width == 40
    distinct = [frame[f"C{f + 1}"].n_unique() for f in range(26)]
    assert all(count <= size for count, size in zip(distinct, teacher.cardinalities))
    assert distinct[8] == 3 and distinct[19] == 4
    assert 60_000 < sum(distinct) < 110_000  # 1.0M at a million rows
    assert frame["label"].mean() == pytest.approx(0.256, abs=0.015)
    assert frame["C1"].str.contains(r"^[0-9a-f]{8}$").all()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_popularity_follows_the_exponent(exponent):
    teacher = Teacher(10, (1000,), zipf_exponent=exponent)
    ids = synthetic._zipf(teacher, np.random.default_rng(0), 1000, (200_000,))
    counts = np.bincount(ids, minlength=1000)
    ranks = np.arange(1000) + 0.5  # middle of each id's stretch of the continuous law
    expected = (ranks + 20) ** -exponent
    expected *= len(ids) / expected.sum()
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected.max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "num_rows must be between 1 and inf, got 0"),
        ({"cardinalities": ()}, "number of cardinalities must be between 1 and 63, got 0"),
        ({"cardinalities": (5, 0)}, "smallest cardinality must be between 1"),
        ({"cardinalities": (1 << 27,)}, "largest cardinality must be between 1 and 67108864"),
        ({"base_rate": 25.0}, "base_rate must be between"),
        ({"missing_rate": -0.1}, "missing_rate must be between 0 and 1"),
        ({"cardinalities": (5,), "max_history": 3}, "needs at least 16 ids, got 5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Teacher(**{"num_rows": 10, "cardinalities": (50,), **arguments})


def test_command_line(tmp_path, capsys):
    synthetic.main(tmp_path / "out", preset="tiny", rows=1_000, file_format="csv")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["train", "valid", "test"]
    assert "auc 0." in printed[0] and "rows 800" in printed[0]


def test_interests_count_the_events_of_the_targets_kind():
    # With a kind for each item, c is how often the item itself is in the history.
    frame, logits = synthetic.interests(4000, num_items=20, num_kinds=20, length=12)
    item, history = frame["item"].to_numpy(), np.stack(frame["history"].to_list())
    rest = logits - 1.5 * np.log1p((history == item[:, None]).sum(axis=1)) + 1.5
    weights = np.array([rest[item == one].mean() for one in range(20)])
    np.testing.assert_allclose(rest, weights[item], atol=1e-12)
    assert 0.1 < weights.std() < 0.6
    assert max(len(set(row)) for row in history.tolist()) == 4
    labels, p = frame["label"].to_numpy(), sigmoid(logits)
    assert abs(labels.sum() - p.sum()) < 4 * math.sqrt((p * (1 - p)).sum())


def test_interests_show_in_no_column_alone():
    frame, logits = synthetic.interests(20_000)
    labels = frame["label"].to_numpy()
    rates = frame.group_by("item").agg(pl.col("label").mean().alias("rate"))
    by_item = frame.join(rates, on="item", maintain_order="left")["rate"].to_numpy()
    assert auc(labels, logits) > 0.84
    assert auc(labels, by_item) < 0.62  # what is known of the item in these very rows


@pytest.mark.parametrize(
    "wrong",
    [{"num_rows": 0}, {"length": 0}, {"num_interests": 0}, {"num_interests": 21}, {"num_items": 30}, {"num_items": 0}],
    ids=str,
)
def test_interests_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"expected one or more rows, .*num_rows="):
        synthetic.interests(**{"num_rows": 10, **wrong})
