"""Anybody's predictions: the same metrics as everywhere, errors that name rows, and two forms of one command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from test_metrics import brute_auc, rows

from ctrlib import cli, metrics
from ctrlib.analysis import evaluate_predictions, read_predictions
from ctrlib.data.scan import DataError
from ctrlib.schema import SchemaError

few = settings(max_examples=60, deadline=None)


def of_users(num_users=300, seed=0, spread=1.0, per_user=12):
    """Rows of users, whose labels and both scores share a part: labels, two probabilities, users."""
    draw = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), draw.integers(1, 2 * per_user, num_users))
    shared = spread * draw.normal(size=num_users)[users]
    logits = shared + draw.normal(size=len(users)) - 1
    labels = draw.random(len(users)) < 1 / (1 + np.exp(-logits))
    noise = spread * draw.normal(size=num_users)[users]
    scores = [1 / (1 + np.exp(-(logits + noise + draw.normal(size=len(users))))) for _ in range(2)]
    return labels, scores[0], scores[1], users


# ----------------------------------------------------------------------------------------------------------- one sort


@few
@given(rows())
def test_one_sort_gives_what_each_metric_gives(found):
    labels, scores, weights, groups = found
    if not (weights > 0).any():
        with pytest.raises(ValueError, match="no row with weight"):
            metrics.evaluate_scores(labels, scores, weights=weights, scale="logit")
        return
    with np.errstate(over="ignore"):
        expected = metrics.evaluate_binary(labels, scores, groups=groups, weights=weights)
        got, bins = metrics.evaluate_scores(labels, scores, groups=groups, weights=weights, scale="logit")
    assert set(got) == {*expected, "auc_se_groups", "log_loss_se", "log_loss_se_groups", "gauc_se"}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    assert bins.error == got["ece"]
    of_order, none = metrics.evaluate_scores(labels, scores, groups=groups, weights=weights, scale="order")
    assert none is None
    assert set(got) - set(of_order) == {
        *("log_loss_se", "log_loss_se_groups"),
        *("log_loss", "normalized_entropy", "calibration", "calibration_se", "ece", "ece_by_chance"),
    }
    assert of_order["auc"] == pytest.approx(got["auc"], nan_ok=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_is_exact_and_probabilities_are_not_clipped(dtype):
    draw = np.random.default_rng(1)
    p = draw.random(3000).astype(dtype)
    labels = draw.random(3000) < p
    got, _ = metrics.evaluate_scores(labels, p)
    assert got["auc"] == metrics.auc(labels, p)
    wide = p.astype(np.float64)
    assert got["log_loss"] == pytest.approx(-np.log(np.where(labels, wide, 1 - wide)).mean(), rel=1e-12)
    assert got["refuted"] == 0

    p[:4], labels[:4] = [0, 1, 1, 0], [True, False, True, False]
    got, _ = metrics.evaluate_scores(labels, p)
    assert got["log_loss"] == math.inf
    assert got["refuted"] == 2
    p[:2] = 0.5
    got, _ = metrics.evaluate_scores(labels, p)
    assert math.isfinite(got["log_loss"])
    assert got["refuted"] == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_equals_a_loop_over_groups(weighted):
    draw = np.random.default_rng(2)
    num_rows = 6000
    users = draw.integers(0, 1500, num_rows)
    labels, scores = draw.integers(0, 2, num_rows), np.round(draw.random(num_rows), 1)
    weights = draw.choice([0.0, 0.5, 2.0], num_rows) if weighted else np.ones(num_rows)
    total = used = dropped = 0.0
    for user in np.unique(users[weights > 0]):
        mine = (users == user) & (weights > 0)
        value = brute_auc(labels[mine], scores[mine], weights[mine])
        if math.isnan(value):
            dropped += 1
            continue
        total, used = total + value * weights[mine].sum(), used + weights[mine].sum()
    far = users.astype(np.int64) * 10**12 - 5 * 10**14  # too far apart to be used as they are
    for groups in (users, users.astype(np.uint32), far, np.array([f"user {user}" for user in users])):
        got, _ = metrics.evaluate_scores(labels, scores, groups=groups, weights=weights)
        assert got["gauc"] == pytest.approx(total / used, rel=1e-12)
        assert got["gauc_groups_dropped"] == dropped


# ------------------------------------------------------------------------------------- rows that are not independent


def test_with_a_group_for_each_row_the_error_is_delongs():
    labels, a, b, _ = of_users()
    alone = np.arange(len(labels))
    expected = metrics.auc_delong(labels, a)
    found = metrics.auc_delong(labels, a, groups=alone)
    assert (found.auc, found.standard_error) == (expected.auc, pytest.approx(expected.standard_error, rel=1e-12))
    paired = metrics.auc_paired_test(labels, a, b)
    assert metrics.auc_paired_test(labels, a, b, groups=alone).standard_error == pytest.approx(paired.standard_error)
    assert metrics.evaluate_scores(labels, a, groups=alone)[0]["auc_se_groups"] == pytest.approx(
        metrics.auc_delong(labels, a).standard_error
    )


def test_the_error_over_users_is_that_of_a_bootstrap_over_users():
    labels, a, b, users = of_users()
    own = metrics.auc_delong(labels, a, groups=users)
    paired = metrics.auc_paired_test(labels, a, b, groups=users)
    draw = np.random.default_rng(3)
    found, _ = metrics.evaluate_scores(labels, a, groups=users)
    losses = -np.log(np.where(labels, a, 1 - a))
    drawn, of_losses, of_gauc = [], [], []
    for _ in range(600):
        counts = np.bincount(draw.integers(0, users.max() + 1, users.max() + 1), minlength=users.max() + 1)
        weights = counts[users].astype(float)
        drawn.append((metrics.auc(labels, a, weights), metrics.auc(labels, b, weights)))
        of_losses.append(np.average(losses, weights=weights))
        of_gauc.append(metrics.gauc(labels, a, users, weights).value)
    of_a, of_b = np.array(drawn).T
    assert own.standard_error == pytest.approx(of_a.std(), rel=0.1)
    assert paired.standard_error == pytest.approx((of_a - of_b).std(), rel=0.1)
    assert own.standard_error > 1.3 * metrics.auc_delong(labels, a).standard_error  # which takes rows as independent
    assert found["auc_se_groups"] == pytest.approx(own.standard_error)
    assert found["log_loss_se_groups"] == pytest.approx(np.std(of_losses), rel=0.1)
    assert found["log_loss_se"] == pytest.approx(losses.std(ddof=1) / math.sqrt(len(losses)))
    assert found["log_loss_se_groups"] > 1.2 * found["log_loss_se"]
    assert found["gauc_se"] == pytest.approx(np.std(of_gauc), rel=0.12)


def test_p_values_over_users_are_uniform_where_two_scores_are_equally_good():
    p_values = []
    for seed in range(200):
        labels, a, b, users = of_users(num_users=120, seed=seed)
        p_values.append(metrics.auc_paired_test(labels, a, b, groups=users).p_value)
    shares = [np.mean(np.array(p_values) < level) for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert np.abs(np.array(shares) - [0.1, 0.3, 0.5, 0.7, 0.9]).max() < 0.1  # 0.035 at most is a standard error


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [0, 0, 1, 1]])
def test_too_few_groups_have_no_error(groups):
    labels, scores = [1, 0, 1, 0], [0.9, 0.2, 0.6, 0.6]
    assert metrics.auc_delong(labels, scores, groups=groups).auc == 0.875
    one_group = len(set(groups)) == 1
    for error in (
        metrics.auc_delong(labels, scores, groups=groups).standard_error,
        metrics.evaluate_scores(labels, scores, groups=groups)[0]["auc_se_groups"],
    ):
        assert math.isnan(error) == one_group


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def frame():
    labels, a, b, users = of_users(80)
    draw = np.random.default_rng(5)
    num_rows = len(labels)
    return pl.DataFrame(
        {
            "click": labels.astype(np.int64),
            "p": a,
            "q": b,
            "user": [f"u{user}" for user in users],
            "shop": draw.choice(["a", "b", "c"], num_rows),
            "price": draw.lognormal(size=num_rows),
            "w": draw.choice([0.0, 1.0, 2.0], num_rows),
        }
    )


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "arrow", "frame"])
def test_every_kind_of_file_gives_the_same(tmp_path, frame, ending):
    path = tmp_path / f"scores.{ending}"
    write = {
        "csv": frame.write_csv,
        "tsv": lambda path: frame.write_csv(path, separator="\t"),
        "jsonl": frame.write_ndjson,
        "parquet": frame.write_parquet,
        "arrow": frame.write_ipc,
    }
    if ending != "frame":
        write[ending](path)
    wanted = {"label": "click", "scores": ["p", "q"], "group": "user", "weight": "w", "by": ["shop", "price"]}
    found = evaluate_predictions(read_predictions(frame if ending == "frame" else path, **wanted))
    labels, users, weights = (frame[name].to_numpy() for name in ("click", "user", "w"))
    for line, name in zip(found["scores"], ("p", "q")):
        expected, _ = metrics.evaluate_scores(labels, frame[name].to_numpy(), groups=users, weights=weights)
        assert {**expected, "score": name} == pytest.approx(line, nan_ok=True)
    assert found["paired"] == []  # no test with weights
    slices = {(line["column"], line["value"], line["score"]): line for line in found["by"]}
    assert len(slices) == 2 * (3 + 10)
    mine = frame.filter(pl.col("shop") == "b")
    expected, _ = metrics.evaluate_scores(mine["click"].to_numpy(), mine["q"].to_numpy(), weights=mine["w"].to_numpy())
    assert slices["shop", "b", "q"]["auc"] == pytest.approx(expected["auc"])
    assert (
        sum(line["rows"] for key, line in slices.items() if key[0] == "price" and key[2] == "p") == (weights > 0).sum()
    )


def test_several_files_follow_each_other_and_scores_are_compared(tmp_path, frame):
    parts = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    frame[:100].write_parquet(parts[0])
    frame[100:].write_parquet(parts[1])
    found = evaluate_predictions(read_predictions(parts, label="click", scores=["p", "q"], group="user"))
    (line,) = found["paired"]
    labels, p, q, users = (frame[name].to_numpy() for name in ("click", "p", "q", "user"))
    expected = metrics.auc_paired_test(labels, p, q, groups=users)
    assert (line["difference"], line["standard_error"]) == pytest.approx((expected.difference, expected.standard_error))
    assert (line["score"], line["other"], line["by_groups"]) == ("p", "q", True)
    rows_only = evaluate_predictions(read_predictions(parts, label="click", scores=["p", "q"]))["paired"][0]
    assert rows_only["standard_error"] == pytest.approx(metrics.auc_paired_test(labels, p, q).standard_error)


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("p", "", "column 'p' holds None; expected a probability from 0 to 1"),
        ("p", "nan", "column 'p' holds 'nan'; expected a probability"),
        ("p", "1.0001", "column 'p' holds '1.0001'; expected a probability.*--scale logit"),
        ("p", "-0.2", "column 'p' holds '-0.2'; expected a probability"),
        ("p", "inf", "column 'p' holds 'inf'; expected a probability"),
        ("p", "high", "column 'p' holds 'high'; expected a probability"),
        ("click", "", "column 'click' holds None; expected a label of 0 or 1"),
        ("click", "2", "column 'click' holds '2'; expected a label of 0 or 1"),
        ("click", "0.5", "column 'click' holds '0.5'; expected a label of 0 or 1"),
        ("click", "yes", "column 'click' holds 'yes'; expected a label of 0 or 1"),
        ("user", "", "column 'user' holds None; expected a group in every row"),
        ("w", "-1", "column 'w' holds '-1'; expected a finite weight, 0 or more"),
        ("w", "", "column 'w' holds None; expected a finite weight"),
    ],
)
def test_a_bad_cell_is_named_by_its_row(tmp_path, frame, column, cell, said):
    texts = frame.with_columns(pl.all().cast(pl.String))
    row = pl.int_range(pl.len()) == 41
    texts = texts.with_columns(pl.when(row).then(pl.lit(cell)).otherwise(pl.col(column)).alias(column))
    texts.write_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match=rf"x\.csv: row 42 \(line 43 of the file\), {said}"):
        read_predictions(tmp_path / "x.csv", label="click", scores=["p"], group="user", weight="w")


@pytest.mark.parametrize("value", [math.nan, None, math.inf, -1e-9])
def test_a_bad_number_of_a_parquet_file_is_named_too(tmp_path, frame, value):
    p = frame["p"].to_list()
    p[17] = value
    frame.with_columns(pl.Series("p", p)).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: row 18, column 'p' holds .*; expected a probability"):
        read_predictions(tmp_path / "x.parquet", label="click", scores=["p"])
    if value == -1e-9:
        read_predictions(tmp_path / "x.parquet", label="click", scores=["p"], scale="order")
    else:
        with pytest.raises(DataError, match=r"row 18, column 'p' holds .*; expected a finite number"):
            read_predictions(tmp_path / "x.parquet", label="click", scores=["p"], scale="order")


def test_wrong_columns_are_refused(frame):
    with pytest.raises(SchemaError, match=r"no columns \['score'\]; the closest are"):
        read_predictions(frame, label="click", scores=["score"])
    with pytest.raises(SchemaError, match=r"row 1, column 'shop' holds .* no other row is better; expected a label"):
        read_predictions(frame.with_columns(shop=pl.lit("a")), label="shop", scores=["p"])
    with pytest.raises(SchemaError, match=r"columns \['p'\] hold lists"):
        read_predictions(frame.with_columns(p=pl.concat_list("p", "q")), label="click", scores=["p"])
    for scores in ("p", [], ["p", "p"]):
        with pytest.raises(ValueError, match="names of columns, each once"):
            read_predictions(frame, label="click", scores=scores)
    with pytest.raises(ValueError, match="scale must be one of probability, logit, order, got 'odds'"):
        read_predictions(frame, label="click", scores=["p"], scale="odds")
    with pytest.raises(ValueError, match="no row has weight"):
        evaluate_predictions(read_predictions(frame.with_columns(w=0), label="click", scores=["p"], weight="w"))


# ---------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_and_gives_json(tmp_path, frame, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame.write_parquet("scores.parquet")
    call = "evaluate scores.parquet --label click --score p q --group user --by shop".split()
    assert cli.main(call) == 0
    said = capsys.readouterr().out
    expected = evaluate_predictions(
        read_predictions("scores.parquet", label="click", scores=["p", "q"], group="user", by=["shop"])
    )
    assert f"AUC {expected['scores'][0]['auc']:30.5f}".split() == said.splitlines()[2].split()
    for text in ("p on scores.parquet, label click", "values of user are independent", "groups independent", "shop"):
        assert text in " ".join(said.split())
    assert cli.main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == expected["scores"]
    assert found["paired"] == expected["paired"]
    assert found["by"] == expected["by"]
    assert len(found["reliability"]["q"]["predicted"]) == 20
    assert cli.main("evaluate scores.parquet --label click --score price --scale order".split()) == 0
    assert "log-loss" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("scores.csv", "predictions need --label and --score: the columns of labels and of scores"),
        ("parts", "predictions need --label and --score"),
        ("scores.csv --label click", "predictions need --label and --score"),
        ("scores.csv --score p", "predictions need --label and --score"),
        ("scores.csv --label click --score p p", "--score names p twice"),
        ("scores.csv --label click --score p --split test", "--split cannot be said"),
        ("scores.csv --label click --score p --batch-size 7", "--batch-size cannot be said"),
        ("nowhere.csv --label click --score p", "nowhere.csv does not exist"),
        ("model --label click", "model is a model folder: leave out --label, of files of predictions"),
        ("model", "model is a model folder: say which DATA to evaluate it on after it"),
        ("nowhere", "nowhere is not a model folder, it does not exist"),
    ],
)
def test_the_two_forms_are_told_apart(tmp_path, frame, monkeypatch, capsys, call, said):
    monkeypatch.chdir(tmp_path)
    frame.write_csv("scores.csv")
    for folder in ("model", "parts"):
        Path(folder).mkdir()
    Path("model/model.json").write_text("{}")
    frame.write_parquet("parts/0.parquet")
    assert cli.main(["evaluate", *call.split()]) == 1
    assert said in capsys.readouterr().err
