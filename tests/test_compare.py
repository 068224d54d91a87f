"""Comparisons: the test means what it says where seeds and rows vary; runs, tables, and what a kill leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

import ctrlib as ctr
from ctrlib import cli, metrics
from ctrlib.selection import comparison as module
from ctrlib.selection.significance import auc_influence, difference_of_means, log_loss_influence

GENERATOR = np.random.default_rng(0)

# The statistic.


def p_values(repeats: int, seeds: int, *, quality: float, noise: float, different: bool) -> np.ndarray:
    """(repeats, 3): p-values of our test, of a t-test over seeds, and of DeLong's on one run of each of two models.

    A run's score is what all runs of its model see in a row, noise of its own, and the signal as well as its seed lets
    it be seen. The models are one and the same, or two that are equally good by different evidence.
    """
    generator, ours, zs, ts = np.random.default_rng(1), [], [], []
    for _ in range(repeats):
        clicked = generator.random(400) < 0.3
        seen = [generator.normal(size=400) for _ in range(2)]
        values, influences = np.empty(2 * seeds), np.empty((2 * seeds, 400))
        for run in range(2 * seeds):
            signal = (1 + quality * generator.normal()) * clicked
            score = signal + seen[run // seeds if different else 0] + noise * generator.normal(size=400)
            values[run], influences[run] = auc_influence(clicked, score)
        a, b = values[:seeds], values[seeds:]
        ours.append(difference_of_means(a, b, influences @ influences.T).p_value)
        ts.append((a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / seeds))
        zs.append((a[0] - b[0]) / np.sqrt(((influences[0] - influences[seeds]) ** 2).sum()))
    return np.stack([ours, 2 * stats.t.sf(np.abs(ts), 2 * seeds - 2), 2 * stats.norm.sf(np.abs(zs))], 1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("quality", "noise", "different"),
    [(0.0, 0.3, False), (0.2, 0.1, False), (0.0, 0.1, True), (0.1, 0.3, True)],
)
def test_p_values_are_uniform_where_there_is_no_difference(
    seeds: int, quality: float, noise: float, different: bool
) -> None:
    found = p_values(300, seeds, quality=quality, noise=noise, different=different)[:, 0]
    assert np.mean(found < 0.05) < 0.09
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_what_tests_of_one_source_of_chance_make_of_the_same() -> None:
    """A t-test over seeds where rows decide, and DeLong's on one run of each where seeds do: most are 'significant'."""
    assert np.mean(p_values(200, 3, quality=0.0, noise=0.1, different=True)[:, 1] < 0.05) > 0.5
    assert np.mean(p_values(200, 3, quality=0.2, noise=0.1, different=False)[:, 2] < 0.05) > 0.5


def test_a_difference_is_found() -> None:
    generator = np.random.default_rng(1)
    clicked = generator.random(2000) < 0.3
    seen = generator.normal(size=2000)
    scores = [good * clicked + seen + 0.1 * generator.normal(size=2000) for good in (1.3, 1.3, 1.3, 1.0, 1.0, 1.0)]
    values, rows = zip(*(auc_influence(clicked, score) for score in scores))
    influences = np.stack(rows)
    found = difference_of_means(values[:3], values[3:], influences @ influences.T)
    assert found.p_value < 1e-3 and 0.03 < found.difference < 0.1
    assert found.difference == pytest.approx(np.mean(values[:3]) - np.mean(values[3:]))
    turned = difference_of_means(values[3:], values[:3], np.roll(influences, 3, 0) @ np.roll(influences, 3, 0).T)
    assert turned.difference == -found.difference and turned.p_value == pytest.approx(found.p_value)


def test_the_parts_of_the_error() -> None:
    zero = np.zeros((4, 4))
    found = difference_of_means([0.7, 0.9], [0.6, 0.6], zero)
    assert (found.of_rows, found.of_seeds, found.degrees) == (0.0, pytest.approx(0.01), pytest.approx(2.0))
    assert found.p_value == pytest.approx(2 * stats.t.sf(2, 2))
    alike = difference_of_means([0.7, 0.7], [0.6, 0.6], np.diag([1.0, 1.0, 1.0, 1.0]) + 1.0)
    assert (alike.of_rows, alike.p_value) == (0.0, 0.0)  # what all runs share is no error of their difference
    apart = np.kron(np.eye(2), np.full((2, 2), 0.0025))
    rows = difference_of_means([0.7, 0.7], [0.6, 0.6], apart)
    assert rows.of_rows == pytest.approx(0.005) and math.isinf(rows.degrees)
    assert rows.p_value == pytest.approx(2 * stats.norm.sf(0.1 / math.sqrt(0.005)))
    assert difference_of_means([0.7, 0.7], [0.7, 0.7], zero).p_value == 1
    negative = difference_of_means([0.7, 0.9], [0.6, 0.6], -apart)
    assert negative.of_rows == 0 and negative.degrees == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("a", "b", "size", "said"),
    [([0.7], [0.6, 0.5], 3, "two runs or more"), ([0.7, 0.6], [0.5, 0.4], 3, r"covariance of shape \(4, 4\)")],
)
def test_what_cannot_be_tested_is_refused(a: list[float], b: list[float], size: int, said: str) -> None:
    with pytest.raises(ctr.CtrlibError, match=said):
        difference_of_means(a, b, np.zeros((size, size)))


@pytest.mark.parametrize("digits", [1, 9])  # with ties, and without
def test_influences_are_delongs(digits: int) -> None:
    labels, a, b = GENERATOR.random(300) < 0.4, *GENERATOR.normal(size=(2, 300)).round(digits)
    (first, of_a), (second, of_b) = auc_influence(labels, a), auc_influence(labels, b)
    delong, paired = metrics.auc_delong(labels, a), metrics.auc_paired_test(labels, a, b)
    assert first == pytest.approx(delong.auc) and first - second == pytest.approx(paired.difference)
    assert np.sqrt((of_a**2).sum()) == pytest.approx(delong.standard_error)
    assert np.sqrt(((of_a - of_b) ** 2).sum()) == pytest.approx(paired.standard_error)


def test_influences_with_weights() -> None:
    labels, scores = GENERATOR.random(200) < 0.4, GENERATOR.normal(size=200).round(1)
    weights = GENERATOR.integers(1, 4, 200)
    value, influence = auc_influence(labels, scores, weights)
    assert value == pytest.approx(metrics.auc(labels, scores, weights))
    many, of_many = auc_influence(np.repeat(labels, weights), np.repeat(scores, weights))
    summed = np.bincount(np.repeat(np.arange(200), weights), of_many)
    assert value == pytest.approx(many)
    np.testing.assert_allclose(influence, summed, rtol=0.02)  # but for how rows are counted
    loss, rows = log_loss_influence(labels, scores, weights)
    assert loss == pytest.approx(metrics.log_loss(labels, scores, weights))
    assert rows.sum() == pytest.approx(0, abs=1e-12)
    plain, of_plain = log_loss_influence(labels, scores)
    losses = np.logaddexp(0, np.where(labels, -scores, scores))
    assert plain == pytest.approx(losses.mean())
    assert np.sqrt((of_plain**2).sum()) == pytest.approx(losses.std(ddof=1) / np.sqrt(200))


def test_holm() -> None:
    assert module.holm([0.02]) == [0.02]
    assert module.holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert module.holm([0.6, 0.9]) == [1.0, 1.0]


# Comparisons.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, rows = np.random.default_rng(1), 3000
    user, item = generator.integers(60, size=rows), generator.integers(20, size=rows)
    logit = generator.normal(size=60)[user] + generator.normal(size=20)[item]
    frame = pl.DataFrame(
        {"user": user, "item": item, "label": (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)}
    )
    folder = tmp_path_factory.mktemp("compare") / "data"
    features = [ctr.Categorical("user"), ctr.Categorical("item")]
    ctr.prepare(frame, folder, features=features, group="user", log=None)
    return folder


def quick(**more: Any) -> dict[str, Any]:
    return {"model": "fm", "embedding_dim": 4, "training": {"max_epochs": 2, "batch_size": 256, **more}}


MODELS = {"good": quick(learning_rate=0.01), "slow": quick(learning_rate=1e-5)}


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of a comparison of these, to be read only, and what was found."""
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, ctr.compare(data, MODELS, out, seeds=2)


def without_clock(value: Any) -> Any:
    """A result without what a clock has measured."""
    if isinstance(value, dict):
        return {name: without_clock(part) for name, part in value.items() if "second" not in name}
    return [without_clock(part) for part in value] if isinstance(value, list) else value


def test_a_comparison_says_what_its_runs_are(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    found = ctr.compare(data, MODELS, tmp_path / "out", seeds=2, seed=5, log=lines.append)
    assert found["chosen"] == "good" and [one["name"] for one in found["models"]] == ["good", "slow"]
    assert [one["seed"] for line in found["models"] for one in line["runs"]] == [5, 6, 7, 8]
    assert [line.split(" (")[0] for line in lines] == ["good, seed 5", "good, seed 6", "slow, seed 7", "slow, seed 8"]
    good = found["models"][0]
    for name in ("valid_auc", "test_auc", "test_logloss"):
        runs = [one[name] for one in good["runs"]]
        assert good[name] == pytest.approx(np.mean(runs)) and good[f"{name}_sd"] == pytest.approx(np.std(runs, ddof=1))
    assert good["test_auc"] > found["models"][1]["test_auc"] + 0.03
    (test,) = found["tests"]
    assert test["name"] == "slow" and test["chosen"] == "good"
    assert test["auc"]["difference"] == pytest.approx(found["models"][1]["test_auc"] - good["test_auc"], abs=1e-6)
    assert test["log_loss"]["difference"] == pytest.approx(
        found["models"][1]["test_logloss"] - good["test_logloss"], abs=1e-6
    )
    assert test["auc"]["p_value"] == test["auc"]["p_holm"] < 0.2
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["tests"] == found["tests"] and saved["chosen"] == "good"
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert folders == ["good-5", "good-6", "slow-7", "slow-8"]
    scored = ctr.Predictor.load(tmp_path / "out" / "good-6").evaluate_prepared(data, "test")
    assert scored["auc"] == pytest.approx(good["runs"][1]["test_auc"])


def test_rows_of_a_group_count_as_one_draw(data: Path, compared: tuple[Path, dict[str, Any]]) -> None:
    scores = module._scored(data, compared[0] / "good-0")
    value, of_groups = module.value_of(scores, auc_influence)
    assert len(of_groups) == len(np.unique(scores.groups)) < len(scores.labels)
    expected, rows = auc_influence(scores.labels[:, 0], scores.logits[:, 0])
    assert value == expected
    groups = np.unique(scores.groups, return_inverse=True)[1]
    factor = np.sqrt(len(of_groups) / (len(of_groups) - 1))
    np.testing.assert_allclose(of_groups, np.bincount(groups, rows) * factor)


class Killed(BaseException):
    """What no part of ctrlib catches. A KeyboardInterrupt in the wrong place would end the tests as well."""


def test_killed_in_any_run_it_ends_the_same(
    data: Path, compared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = compared
    run, started = module.run, []

    def stopped(*arguments: Any, **named: Any) -> Any:
        started.append(named["out"].name)
        if len(started) % 2 == 0:
            named["on_epoch"] = lambda line: (_ for _ in ()).throw(Killed)
        return run(*arguments, **named)

    monkeypatch.setattr(module, "run", stopped)
    for _ in range(3):
        with pytest.raises(Killed):
            ctr.compare(data, MODELS, tmp_path / "out", seeds=2)
    remove = module.remove

    def killing(path: Path) -> None:
        if path.name == "comparing.json":
            raise Killed
        remove(path)

    monkeypatch.setattr(module, "remove", killing)
    with pytest.raises(Killed):
        ctr.compare(data, MODELS, tmp_path / "out", seeds=2)  # all is there but for the clean-up
    monkeypatch.setattr(module, "remove", remove)
    found = ctr.compare(data, MODELS, tmp_path / "out", seeds=2)
    assert started == ["good-0", "good-1", "good-1", "slow-2", "slow-2", "slow-3", "slow-3"]
    assert without_clock(found) == without_clock(whole)
    assert not list((tmp_path / "out").rglob("checkpoints")) and not (tmp_path / "out" / "comparing.json").exists()
    with pytest.raises(ctr.CtrlibError, match="is a folder of `ctrlib compare` already"):
        ctr.compare(data, MODELS, tmp_path / "out", seeds=2)


def test_an_older_comparison_stays_until_the_new_one_is_over(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a run, or anywhere as it takes the other's place, the same command ends as one that was not."""
    out, run, remove = tmp_path / "out", module.run, module.remove
    whole = ctr.compare(data, MODELS, out, seeds=2)
    renamed = {"good": MODELS["good"], "slower": MODELS["slow"]}
    for one in ("good-0", "slow-3"):
        (out / one / "mark").touch()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stopped(*arguments: Any, **named: Any) -> Any:
        if named["out"].name == "good-1":
            raise Killed
        return run(*arguments, **named)

    monkeypatch.setattr(module, "run", stopped)
    with pytest.raises(Killed):
        ctr.compare(data, renamed, out, seeds=2, overwrite=True)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(ctr.CtrlibError, match=r"anew holds an unfinished comparison.*seed was 0, is now 5"):
        ctr.compare(data, renamed, out, seeds=2, seed=5, overwrite=True)
    monkeypatch.setattr(module, "run", run)
    kills, calls = 0, 0

    def killing(path: Path) -> None:
        nonlocal calls
        calls += path.name[-1].isdigit()
        if calls > kills:
            raise Killed
        remove(path)

    monkeypatch.setattr(module, "remove", killing)
    found = None
    while found is None:
        try:
            found = ctr.compare(data, renamed, out, seeds=2, overwrite=True)
        except Killed:
            if kills == 2:
                with pytest.raises(ctr.CtrlibError, match=r"anew holds a comparison, .*seed was 0, is now 5"):
                    ctr.compare(data, renamed, out, seeds=2, seed=5, overwrite=True)
            kills, calls = kills + 1, 0
            monkeypatch.setattr(module, "run", None)  # all runs are over
    assert kills == 5  # two runs of before that have no successor, and four of now but those that were moved
    assert json.dumps(without_clock(found)).replace("slower", "slow") == json.dumps(without_clock(whole))
    assert found == json.loads((out / "comparison.json").read_text())
    names = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert names == {"good-0", "good-1", "slower-2", "slower-3", "comparison.json"}
    assert not list(out.rglob("mark"))
    for line in found["models"]:
        for one in line["runs"]:
            assert ctr.Predictor.load(out / one["folder"]).evaluate_prepared(data, "test")["auc"] == one["test_auc"]


def test_another_comparison_does_not_go_on_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise Killed

    monkeypatch.setattr(module, "run", stopped)
    with pytest.raises(Killed):
        ctr.compare(data, MODELS, tmp_path / "out", seeds=2)
    other = {**MODELS, "slow": quick(learning_rate=2e-5)}
    with pytest.raises(ctr.CtrlibError, match=r"models.slow.training.learning_rate was 1e-05, is now 2e-05"):
        ctr.compare(data, other, tmp_path / "out", seeds=2)


@pytest.mark.parametrize(
    ("models", "seeds", "said"),
    [
        (["fm"], 2, "expected two or more to compare"),
        (["fm", "fm"], 2, "a model is named twice"),
        ("fm", 2, "expected a list of names"),
        (["fm", "mpl"], 2, "unknown model 'mpl'; the closest are"),
        (["fm", "mlp"], 1, "seeds"),
        ({"a/b": quick(), "c": quick()}, 2, "models names 'a/b', of which a folder is made"),
        ({"a": quick(), "b": {"model": "fm", "hidden": [3]}}, 2, "fm takes no"),
        ({"a": quick(), "b": quick(batchsize=3)}, 2, "training has no"),
    ],
)
def test_what_cannot_be_compared_is_refused(models: Any, seeds: int, said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ctr.CtrlibError, match=said):
        ctr.compare(data, models, tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "best.json").write_text(json.dumps(quick(learning_rate=0.01)))
    (tmp_path / "slow.json").write_text(json.dumps(quick(learning_rate=1e-5)))
    out = str(tmp_path / "out")
    files = f"{tmp_path}/best.json,{tmp_path}/slow.json"
    arguments = ["compare", str(data), "--models", files, "--seeds", "2", "--out", out]
    assert cli.main(arguments) == 0
    printed, said = capsys.readouterr()
    assert max(map(len, printed.splitlines())) <= 80 + len(out)
    assert "on test, against best, the best by validation" in printed and "slow, seed 3 (4 of 4)" in said
    assert cli.main([*arguments, "--json", "--overwrite"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == "best" and found["tests"][0]["name"] == "slow"
    assert cli.main(arguments) == 1
    assert "already" in capsys.readouterr().err
    for wrong, expected in (
        ("fm", "expected two or more to compare"),
        ("fm,nowhere.json", "--models nowhere.json: there is no such file"),
        (f"{tmp_path}/best.json {tmp_path}/best.json", "--models has best twice"),
    ):
        assert cli.main(["compare", str(data), "--models", *wrong.split(), "--out", f"{out}2"]) == 1
        assert expected in capsys.readouterr().err
