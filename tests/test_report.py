"""`ctrlib report`: a page that needs nothing, whose pictures have their numbers beside, of runs and of predictions."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import ctrlib as ctr
from ctrlib import cli, metrics
from ctrlib.analysis.charts import Series, chart, dots
from ctrlib.analysis.importance import groups_of, permutation_importance, permuted
from ctrlib.analysis.runs import load_runs, score_runs
from ctrlib.data.columns import decode, find_row_groups
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.manifest import load_schema
from ctrlib.schema import SchemaError

NAMES = {"label": "click", "C1": "item", "C2": "user", "C3": "shop", "I1": "price", "I2": "age", "history": "clicked"}
BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of a known teacher, and two runs of it."""
    where = tmp_path_factory.mktemp("report")
    clicks = generate(Teacher(6_000, cardinalities=(60, 80, 5), num_numeric=2, max_history=4, seed=3))[0].rename(NAMES)
    features = [ctr.Sequence("clicked", vocabulary="item")]
    ctr.prepare(clicks, where / "data", features=features, labels="click", group="user", log=None)
    clicks.write_parquet(where / "clicks.parquet")
    clicks[:500].write_parquet(where / "today.parquet")
    for name, model in (("first", "dcnv2"), ("second", "fm")):
        how = {"batch_size": 256, "learning_rate": 5e-3, "max_epochs": 2, "device": "cpu"}
        config = {"model": model, "embedding_dim": 8, "training": how}
        built, _ = ctr.run(where / "data", config, out=where / name)
        ctr.save_model(built, config, where / "data", where / name)
    return where


class Page(HTMLParser):
    """What a page refers to, and in which order its headings, pictures and tables stand."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.order: list[str] = []
        self.links: list[str] = []
        self.numbers: list[float] = []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.links += [value for name, value in given.items() if name in ("src", "href", "data", "action")]
        self.numbers += [float(given[name]) for name in ("cx", "cy", "x1", "x2", "y1", "y2", "x", "y") if name in given]
        if tag in ("figure", "table"):
            self.order.append(tag)
        self._heading = tag == "h2"

    def handle_data(self, data):
        if self._heading:
            self.order.append(f"# {data}")
            self._heading = False


def check_page(text: str) -> list[str]:
    """It needs no network, draws at places that exist, and has a table in each section with a picture; its headings."""
    page = Page(text)
    assert page.links == []
    assert not re.search(r"https?:|url\(|@import|\bnan\b|\binf\b", text.replace("<!doctype html>", ""))
    assert all(math.isfinite(number) for number in page.numbers)
    sections = " ".join(page.order).split("# ")[1:]
    for section in sections:
        assert "figure" not in section.split() or section.split()[-1] == "table", section
    return [part[2:] for part in page.order if part.startswith("# ")]


def report(folder, capsys, *arguments):
    status = cli.main(["report", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out + said.err


# ------------------------------------------------------------------------------------------------------------- pages


def test_of_two_runs_the_page_says_what_was_measured(folder, capsys, tmp_path):
    out, scores = tmp_path / "r.html", tmp_path / "scores.parquet"
    runs = [folder / "first", folder / "second"]
    call = [*runs, "--data", folder / "data", "--by", "shop", "--together", "price:age", "--out", out]
    status, said = report(folder, capsys, *call, "--scores", scores, "--json")
    assert status == 0, said
    found = json.loads(said)
    text = out.read_text()
    assert check_page(text) == [
        *("Runs", "Metrics", "Which ranks better", "Reliability", "By shop", "Permutation importance"),
        *("Learning curves", "Throughput and bytes"),
    ]
    (evaluated,) = found["evaluated"]
    for line, run in zip(evaluated["scores"], runs):
        result = json.loads((run / "metrics.json").read_text())
        assert line["score"] == run.name
        for key in ("auc", "auc_se", "gauc", "calibration", "ece", "pr_auc"):
            assert line[key] == pytest.approx(result[f"test_{key}"], rel=1e-6), key
        assert line["log_loss"] == pytest.approx(result["test_logloss"], rel=1e-6)
        assert f'data-value="{line["auc"]!r}"' in text
        assert f'data-value="{result["embedding_bytes"]!r}"' in text
    saved = pl.read_parquet(scores)
    assert saved.columns == ["click", "user", "shop", "first", "second"]
    clicks = pl.read_parquet(folder / "clicks.parquet")
    assert saved["user"].dtype == pl.String and saved["user"].is_in(clicks["user"].unique().to_list()).all()
    labels, a, b, users = (saved[name].to_numpy() for name in ("click", "first", "second", "user"))
    test = metrics.auc_paired_test(labels, a, b, groups=users)
    (paired,) = evaluated["paired"]
    assert paired["difference"] == pytest.approx(test.difference)
    assert paired["p_value"] == pytest.approx(test.p_value)
    assert paired["by_groups"]
    shops = {line["value"]: line for line in evaluated["by"] if line["score"] == "first"}
    for shop, line in shops.items():
        mine = saved.filter(pl.col("shop") == shop)
        assert line["auc"] == pytest.approx(metrics.auc(mine["click"], mine["first"]), nan_ok=True)
    of_first = {line["features"]: line for line in found["importance"]["first"]}
    assert {"clicked + item", "price + age", "shop"} <= set(of_first)
    # The file of scores is what `ctrlib evaluate` takes.
    call = f"evaluate {scores} --label click --score first second --group user --json"
    assert cli.main(call.split()) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["scores"][0]["auc"] == evaluated["scores"][0]["auc"]


def test_without_rows_it_shows_what_the_run_reported(folder, capsys, tmp_path):
    status, said = report(folder, capsys, folder / "first", "--out", tmp_path / "r.html")
    assert status == 0
    assert "open it in a browser" in said
    text = (tmp_path / "r.html").read_text()
    assert check_page(text) == [
        *("The run", "What was measured", "Learning curves", "Throughput and bytes"),
    ]
    assert "Made without --data" in text
    auc = json.loads((folder / "first" / "metrics.json").read_text())["test_auc"]
    assert f'data-value="{auc!r}"' in text


def test_a_run_at_work_is_followed_until_it_is_over(folder, capsys, tmp_path, monkeypatch):
    """Its folder as it is while it trains, and then as it is when it is over."""
    run, out = tmp_path / "run", tmp_path / "r.html"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "first" / "log.jsonl", run)
    seen = []

    def over(seconds):
        seen.append((seconds, out.read_text()))
        (run / "checkpoints").rmdir()
        for name in ("metrics.json", "model.json"):
            shutil.copy(folder / "first" / name, run)

    monkeypatch.setattr("ctrlib.cli.report.time.sleep", over)
    status, said = report(folder, capsys, run, "--out", out, "--watch", 7)
    assert status == 0, said
    ((seconds, meanwhile),) = seen
    assert seconds == 7
    assert '<meta http-equiv="refresh" content="7">' in meanwhile
    assert "Not over yet: run." in meanwhile
    assert check_page(meanwhile) == ["The run", "Learning curves"]
    text = out.read_text()
    assert "refresh" not in text
    assert check_page(text) == ["The run", "What was measured", "Learning curves", "Throughput and bytes"]
    status, said = report(folder, capsys, run, "--out", tmp_path / "x.html", "--watch", 7, "--data", folder / "data")
    assert status == 1
    assert "--watch follows what runs report while they train: leave out --data" in said


def test_of_raw_rows_and_of_predictions(folder, capsys, tmp_path):
    scores = tmp_path / "s.csv"
    call = [folder / "first", "--data", folder / "today.parquet", "--by", "price", "shop", "--scores", scores]
    status, said = report(folder, capsys, *call, "--out", tmp_path / "raw.html")
    assert status == 0, said
    headings = check_page((tmp_path / "raw.html").read_text())
    assert headings == ["The run", "Metrics", "Reliability", "By price", "By shop", *headings[-2:]]
    expected, _ = ctr.Predictor.load(folder / "first").predict(folder / "today.parquet")
    assert np.allclose(pl.read_csv(scores)["first"], expected["click"], atol=1e-7)
    assert pl.read_csv(scores)["user"].to_list() == pl.read_parquet(folder / "today.parquet")["user"].to_list()
    call = [scores, "--label", "click", "--score", "first", "--group", "user", "--by", "shop"]
    status, said = report(folder, capsys, *call, "--out", tmp_path / "p.html")
    assert status == 0, said
    assert check_page((tmp_path / "p.html").read_text()) == ["Metrics", "Reliability", "By shop"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("nowhere", "nowhere is no folder: expected a folder that `ctrlib train --out` has written"),
        ("data", "data holds neither model.json nor metrics.json"),
        ("first first", "give each folder once"),
        ("first --by shop", "--by: say which rows with --data"),
        ("first --data today.parquet --split test", "is raw data, and --split is for prepared folders"),
        ("first --data nowhere.csv", "nowhere.csv does not exist"),
        ("first --data data --by nothing", "has no column 'nothing' with one id a row"),
        ("first --data data --together price:color", "there are no features ['color'] to permute together"),
        ("first --out report.txt", "--out must end in .html, got 'report.txt'"),
        ("first --data data --scores s.txt", "--scores must end in .csv or .parquet"),
        ("today.parquet", "predictions need --label and --score"),
        ("today.parquet --label click --score price", "expected a probability from 0 to 1"),
        ("today.parquet --label click --score price --data data", "holds predictions, so --data cannot be said"),
        ("first --label click", "is a model folder: leave out --label, of files of predictions"),
    ],
)
def test_what_cannot_be_shown_is_refused(folder, monkeypatch, capsys, call, said):
    monkeypatch.chdir(folder)
    status, answer = report(folder, capsys, *call.split())
    assert status == 1
    assert said in answer
    assert not Path("report.html").exists()


def test_runs_are_called_by_what_tells_them_apart(folder, tmp_path):
    for name in ("a/run", "b/run"):
        shutil.copytree(folder / "first", tmp_path / name)
    assert [run.name for run in load_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]
    assert [run.name for run in load_runs([folder / "first", folder / "second"])] == ["first", "second"]
    (tmp_path / "a" / "run" / "metrics.json").write_text("[")
    with pytest.raises(SchemaError, match=r"metrics\.json is damaged"):
        load_runs([tmp_path / "a" / "run"])
    (tmp_path / "a" / "run" / "model.json").unlink()
    (tmp_path / "a" / "run" / "metrics.json").write_text("{}")
    with pytest.raises(SchemaError, match=r"holds no model\.json"):
        score_runs(load_runs([tmp_path / "a" / "run"]), folder / "data")


# -------------------------------------------------------------------------------------------------------- importance


class OfOne(torch.nn.Module):
    """A model that looks at the ids of one feature, and at one number."""

    def __init__(self, feature: str) -> None:
        super().__init__()
        self.feature = feature

    def forward(self, batch):
        ids = batch.sparse[self.feature].to_padded_dense(1)
        return torch.sin(ids.float()) + batch.dense[:, :1]


def test_importance_is_of_what_the_model_looks_at(folder):
    data = folder / "data"
    predictor = ctr.Predictor(OfOne("item").eval(), load_schema(data), data)
    lines = permutation_importance(predictor, data, together=[("item", "price")], repeats=2)
    drops = {line["features"]: line["auc_drop"] for line in lines}
    assert [name for name, drop in drops.items() if drop == 0] == sorted(
        {"user", "shop", "age", "clicked"}, key=list(drops).index
    )
    assert drops["clicked + item"] == drops["item"] != 0
    assert drops["price"] not in (0, drops["item + price"])
    # By hand: the same permutations of the same rows.
    schema = load_schema(data)
    columns = decode(find_row_groups(data, "test", schema), schema, True)
    draw = np.random.default_rng(0)
    labels = columns.floats[:, 2]
    at = [feature.name for feature in schema.sparse if feature.name not in columns.ragged].index("item")
    price = [feature.name for feature in schema.dense].index("price")
    assert price == 0

    def logits(ids, numbers):
        return np.sin(ids.astype(np.float32)) + numbers

    ids, numbers = columns.ids[:, at], columns.floats[:, 0]
    expected = [
        metrics.auc(labels, logits(ids, numbers)) - metrics.auc(labels, logits(ids[places], numbers))
        for places in (draw.permutation(len(labels)), draw.permutation(len(labels)))
    ]
    assert drops["item"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert all(line["low"] <= line["auc_drop"] <= line["high"] for line in lines)


def test_permuted_rows_keep_what_is_not_named(folder):
    schema = load_schema(folder / "data")
    columns = decode(find_row_groups(folder / "data", "test", schema), schema, True)
    places = np.random.default_rng(0).permutation(len(columns.ids))
    moved = permuted(columns, schema, ["clicked", "age"], places)
    assert (moved.ids == columns.ids).all()
    assert (moved.floats[:, 1] == columns.floats[places, 1]).all()
    assert (moved.floats[:, [0, 2]] == columns.floats[:, [0, 2]]).all()
    expected = columns.take(places).ragged["clicked"]
    assert (moved.ragged["clicked"].values == expected.values).all()
    assert (moved.ragged["clicked"].offsets == expected.offsets).all()
    assert groups_of(schema)[-1] == ("clicked", "item")


# ---------------------------------------------------------------------------------------------------------- pictures


def test_charts_leave_out_what_is_not_finite():
    series = [Series("a", [1, 2, 3], [0.5, math.nan, 0.7]), Series("b", [1, 2, 3], [math.inf, 0.2, 0.4])]
    assert chart("t", series, "x", "y").count("<circle") == 4
    assert chart("t", [Series("a", [1.0], [math.nan])], "x", "y") == ""
    assert chart("t", [Series("a", [0.0, 0.1], [0.1, 0.2])], "x", "y", log=True).count("<circle") == 1
    assert dots("t", ["a"], [Series("s", [], [math.nan])], "u") == ""
    drawn = dots("t", ["a", "b"], [Series("s", [], [0.5, 0.5], [math.nan, 0.4], [math.nan, 0.6])], "u")
    assert drawn.count("<circle") == 2
    assert drawn.count('class="whisker') == 1
    for alone in ([0.0], [1.0], [-3.5], [1e-9]):  # one number only still has an axis
        assert "nan" not in chart("t", [Series("s", [1.0], alone)], "x", "y")
    with pytest.raises(ValueError, match="expected 2 numbers in each series"):
        dots("t", ["a", "b"], [Series("s", [], [0.5])], "u")


@pytest.mark.skipif(not BROWSERS, reason="there is no chromium to open it with")
def test_a_browser_opens_it_without_network(folder, capsys, tmp_path):
    call = [folder / "first", folder / "second", "--data", folder / "data", "--by", "shop", "--rows", "0"]
    assert report(folder, capsys, *call, "--out", tmp_path / "r.html")[0] == 0
    script = "document.querySelectorAll('th')[3].click(); document.title = 'sorted';"
    text = (tmp_path / "r.html").read_text().replace("</html>", f"<script>{script}</script></html>")
    (tmp_path / "r.html").write_text(text)
    flags = "--headless --no-sandbox --disable-gpu --proxy-server=127.0.0.1:9 --dump-dom --virtual-time-budget=2000"
    opened = subprocess.run(
        [BROWSERS[0], *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "r.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    assert "<title>sorted</title>" in opened
    aucs = [json.loads((folder / name / "metrics.json").read_text())["valid_auc"] for name in ("first", "second")]
    body = opened[opened.index("<tbody>") :]
    assert re.findall(r'data-value="(0\.\d+)"', body)[0] == repr(max(aucs))  # the first row is now the largest
    assert opened.count("<svg") == text.count("<svg") > 5
