"""A model card: every value in it is one of the folder, of the run or of the data, and its lines of code run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli
from ctrlib.analysis.runs import load_runs
from ctrlib.data.events import Events, History
from ctrlib.export.folder import export_model
from ctrlib.manifest import manifest_of, write_manifest
from ctrlib.retrieval.folder import load
from ctrlib.search.compression import compress
from ctrlib.serving.model_folder import model_in_the_making
from ctrlib.training.evaluate import predict

ROOT = Path(__file__).parent.parent
TRAINING = {"batch_size": 64, "max_epochs": 2, "seed": 3}
CONFIG: dict[str, Any] = {"model": "mlp", "embedding_dim": 4, "hidden": [8], "training": TRAINING}


def frame(rows: int = 800, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    items = random.integers(0, 40, rows)
    return pl.DataFrame(
        {
            "click": (random.random(rows) < 0.2 + 0.4 * (items % 2)).astype(int),
            "item": [f"i{item}" for item in items],
            "us|er": random.integers(0, 200, rows),
            "price": [None if n % 5 == 0 else float(n) for n in range(rows)],
            "always": ["same"] * rows,
        }
    )


def table_below(text: str, heading: str) -> dict[str, list[str]]:
    """The first table below a heading: first cells -> the others."""
    lines = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return tables(lines)


def tables(lines: list[str]) -> dict[str, list[str]]:
    """Of all tables in some lines: first cells -> the others."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {first: others for first, *others in cells if first != "---"}


def code_of(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_code(folder: Path) -> dict[str, Any]:
    """What the card's lines leave when they are run in the folder."""
    names: dict[str, Any] = {}
    with inside(folder):
        exec(code_of((folder / "README.md").read_text()), names)
    return names


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a run of the command line that set baselines beside it."""
    home = tmp_path_factory.mktemp("card")
    frame().write_csv(home / "clicks.csv")
    ctr.prepare(home / "clicks.csv", home / "data", labels="click", group="us|er", note="made up | for tests", log=None)
    words = ["train", home / "data", "--out", home / "run", "--model", "mlp", "--dim", "4", "--hidden", "8"]
    words += ["--bins", "16", "--epochs", "2", "--batch-size", "64", "--calibrate", "True"]
    assert cli.main([*map(str, words)]) == 0
    return home


def test_the_values_are_those_of_the_run(home: Path) -> None:
    text = (home / "run" / "README.md").read_text()
    result = json.loads((home / "run" / "metrics.json").read_text())
    report = json.loads((home / "data" / "report.json").read_text())
    saved = json.loads((home / "run" / "model.json").read_text())
    schema = ctr.Schema.load(home / "data")
    model = table_below(text, "Model")
    assert model["parameters"] == [f"{result['parameters']:,}, of the network {result['network_parameters']:,}"]
    assert model["embedding bytes"] == [f"{result['embedding_bytes']:,}"]
    assert model["bytes of model.safetensors"] == [f"{(home / 'run' / 'model.safetensors').stat().st_size:,}"]
    assert model["`hidden`"] == ["`[8]`"] and model["`embedding_dim`"] == ["`4`"]
    data = table_below(text, "Data")
    assert data["data"] == [f"`{home / 'data'}`"]
    assert data["hash of the schema"] == [f"`{schema.hash}`"]
    assert data["hash of the rows"] == [f"`{result['run_record']['rows_hash']}`"]
    assert data["group"] == ["<code>us&#124;er</code>"]  # a name with a | does not end its cell
    assert data["note"] == ["made up &#124; for tests"]
    for split in ("train", "valid", "test"):
        assert data[split] == [f"{report['rows'][split]:,}", f"{report['label_mean'][split]['click']:.5f}"]
    item = report["features"]["item"]
    assert data["`item`"] == ["categorical", "43", "0.00 %", f"{100 * item['oov']['test']:.2f} %"]
    assert data["<code>us&#124;er</code>"][3] == f"{100 * report['features']['us|er']['oov']['test']:.2f} %" != "0.00 %"
    assert data["`price`"] == ["numeric", "standard", "", ""]
    assert "Columns of the data that it does not read: `always`." in text
    protocol = table_below(text, "Protocol")
    for name, value in saved["training"].items():
        if name not in ("workers", "device", "sharding", "plan", "checkpoint_seconds"):
            assert protocol[f"`{name}`"] == [f"`{json.dumps(value)}`"]
    assert f"The weights are those of epoch {result['best_epoch']} of {result['epochs']}, chosen by valid" in text
    assert "Test was scored once" in text
    lines = [line for line in text.splitlines() if line.startswith("| test |") or line.startswith("| valid |")]
    for one in result["run_record"]["metrics"]:
        value = f"{one['value']:.5f} | {one['low']:.5f} to {one['high']:.5f} |"
        assert any(value in line for line in lines), one
    assert f"| valid | `click` | AUC | {result['valid_auc']:.5f} |  |" in lines
    assert f"| test | `click` | rows | {int(result['test_rows'])} |  |" in lines
    assert "take values of <code>us&#124;er</code> as independent" in text
    beside = tables(text.partition("### Beside simple models")[2].splitlines())
    assert beside["`click`"][0] == "gradient boosting"  # the last
    for one in result["baselines"]:
        assert f"| `click` | {one['name']} | {one['auc']:.5f} | {one['log_loss']:.5f} |" in text
    assert all(f"- {warning}." in text for warning in result["warnings"])
    slope, intercept = (saved["calibration"][name][0] for name in ("slope", "intercept"))
    assert f"fitted on valid: {slope:.5f} and {intercept:.5f}." in text
    assert f"learnt from {report['rows']['train']:,} rows" in text
    assert "The exact engine trained it" in text and "A missing number" in text and "An id that train" in text
    assert table_below(text, "Versions")["ctrlib"] == [f"`{ctr.__version__}`"] or ctr.__version__ in text


def test_its_lines_run_in_the_folder(home: Path) -> None:
    names = run_code(home / "run")
    row = dict.fromkeys(["item", "us|er", "price"])
    expected, _ = ctr.Predictor.load(home / "run").predict(row)
    assert names["row"] == row
    assert names["probabilities"]["click"].to_list() == expected["click"].to_list()
    command = re.search(r"`(ctrlib predict [^`]+)`", (home / "run" / "README.md").read_text())
    assert command is not None
    frame(20, seed=1).write_csv(home / "rows.csv")
    with inside(home / "run"):
        assert cli.main(command[1].split()[1:]) == 0
    assert pl.read_csv(home / "scores.csv")["click"].is_between(0, 1).all()


def test_two_runs_of_the_same_bits_have_the_same_card(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        model, result = ctr.run(home / "data", CONFIG)
        ctr.save_model(model, CONFIG, home / "data", tmp_path / name, result=result)
    one, other = ((tmp_path / name / "README.md").read_text() for name in ("a", "b"))
    assert one == other and "| test | `click` | AUC |" in one


def test_without_a_result_it_says_so_and_has_no_metrics(home: Path, tmp_path: Path) -> None:
    model = ctr.models.build(CONFIG, ctr.Schema.load(home / "data"))
    (tmp_path / "metrics.json").write_text('{"valid_auc": 0.99}')  # of some other run that is there
    ctr.save_model(model, CONFIG, home / "data", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "No result of a run was given" in text
    assert "## Metrics" not in text and "0.99" not in text and "AUC" not in text
    with pytest.raises(TypeError, match="result"):
        ctr.save_model(model, CONFIG, home / "data", tmp_path, result=0.7)  # type: ignore[arg-type]


def test_a_folder_without_report_or_splits_is_told_of_as_such(home: Path, tmp_path: Path) -> None:
    schema = ctr.Schema.load(home / "data")
    model = ctr.models.build(CONFIG, schema)
    ctr.save_model(model, CONFIG, home / "run", tmp_path)  # a model folder has neither
    text = (tmp_path / "README.md").read_text()
    assert "has no report.json" in text and "| train |" not in text and "It has learnt from" not in text
    assert table_below(text, "Data")["`item`"] == ["categorical", "43", "", ""]


def test_a_damaged_report_is_refused_before_a_model_is_written(home: Path, tmp_path: Path) -> None:
    schema = ctr.Schema.load(home / "data")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("schema.json", "MANIFEST", "report.json"):
        (data / name).write_bytes((home / "data" / name).read_bytes())
    for part in ("vocab", "numbers"):
        (data / part).symlink_to(home / "data" / part)
    (data / "report.json").write_text("[")
    with pytest.raises(ctr.schema.SchemaError, match=r"report\.json is damaged"):
        ctr.save_model(ctr.models.build(CONFIG, schema), CONFIG, data, tmp_path / "out")
    write_manifest(data, "prepared")
    with pytest.raises(ctr.schema.SchemaError, match=r"report\.json cannot be read"):
        ctr.save_model(ctr.models.build(CONFIG, schema), CONFIG, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_people_may_write_into_it(home: Path, tmp_path: Path) -> None:
    model = ctr.models.build(CONFIG, ctr.Schema.load(home / "data"))
    ctr.save_model(model, CONFIG, home / "data", tmp_path / "model")
    path = tmp_path / "model" / "README.md"
    manifest = manifest_of(tmp_path / "model")
    assert manifest is not None and "README.md" not in manifest.files
    path.write_text(path.read_text() + "\nLicence: ours.\n")
    ctr.Predictor.load(tmp_path / "model")
    path.unlink()
    ctr.Predictor.load(tmp_path / "model")
    ctr.save_model(model, CONFIG, home / "data", tmp_path / "model")  # the card of the model that is there
    assert "Licence" not in path.read_text()


def test_a_compressed_model_says_what_it_was_made_from(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = ["compress", home / "run", home / "data", "--ratio", "3", "--out", out, "--epochs", "0"]
    assert cli.main([*map(str, words)]) == 0
    text, result = (out / "README.md").read_text(), json.loads((out / "compression.json").read_text())
    model = table_below(text, "Model")
    assert model["made smaller by"] == [f"`{result['method']}`"]
    expected = [f"{result['embedding_bytes_before']:,}, {result['embedding_bytes_after']:,}"]
    assert model["embedding bytes, before and after"] == expected
    assert model["test AUC, before and after"] == [f"{result['test_auc_before']:.5f}, {result['test_auc_after']:.5f}"]
    report = json.loads((home / "data" / "report.json").read_text())
    assert table_below(text, "Data")["train"][0] == f"{report['rows']['train']:,}"  # of the data, not of the model
    (auc,) = [line for line in result["run_record"]["metrics"] if line["metric"] == "auc"]
    assert f"| test | `click` | AUC | {auc['value']:.5f} | {auc['low']:.5f} to {auc['high']:.5f} |" in text
    manifest = manifest_of(out)
    assert manifest is not None and manifest.kind == "compress" and "README.md" not in manifest.files
    assert run_code(out)["probabilities"].height == 1


def test_a_compressed_model_stands_beside_the_original(home: Path, tmp_path: Path) -> None:
    """One form of record, of the calibrated scores that the folder gives, and both in one report."""
    out, data = tmp_path / "small", home / "data"
    result = compress(home / "run", data, out, ratio=3, epochs=0, seed=5)
    first, second = load_runs([home / "run", out])
    assert first.record is not None and second.record is not None
    assert list(second.record) == list(first.record)
    same = ("task", "model", "engine", "data", "schema_hash", "rows_hash", "independent")
    assert {name: second.record[name] for name in same} == {name: first.record[name] for name in same}
    assert [second.record[name] for name in ("independent", "seed", "chosen_by")] == ["us|er", 5, "valid auc"]
    predictor = ctr.Predictor.load(out)
    scores, scored = (
        predictor.evaluate_prepared(data, "test"),
        predict(predictor.model, ctr.Loader(data, "test", batch_size=64)),
    )
    lines = {line["metric"]: line for line in second.record["metrics"]}
    for metric in ("auc", "gauc", "log_loss", "calibration"):
        assert lines[metric]["value"] == pytest.approx(scores[metric], rel=1e-6)
    of_users = ctr.metrics.auc_delong(scored.labels[:, 0], scored.logits[:, 0], groups=scored.groups)
    found = [lines["auc"][name] for name in ("value", "low", "high")]
    assert found == pytest.approx([of_users.auc, of_users.low, of_users.high], abs=1e-5)
    assert (result["test_auc"], result["test_rows"]) == (result["test_auc_after"], scores["rows"])
    assert cli.main(["report", str(home / "run"), str(out), "--out", str(tmp_path / "both.html")]) == 0
    text = (tmp_path / "both.html").read_text()
    for run in (first, second):
        assert f'data-value="{run.result["test_auc"]!r}"' in text
        assert f"{run.result['embedding_bytes']:,}" in text
    assert second.result["embedding_bytes"] == result["embedding_bytes_after"] < first.result["embedding_bytes"]


def test_a_search_says_its_method_and_settings(home: Path, tmp_path: Path) -> None:
    words = ["search", "optfs", home / "data", "--model", "mlp", "--dim", "4", "--hidden", "8", "--out", tmp_path / "o"]
    words += ["--epochs", "1", "--batch-size", "64"]
    assert cli.main([*map(str, words)]) == 0
    text, result = (tmp_path / "o" / "README.md").read_text(), json.loads((tmp_path / "o" / "search.json").read_text())
    model = table_below(text, "Model")
    assert model["made smaller by"] == ["`optfs`"]
    expected = [f"{result['embedding_bytes_before']:,}, {result['embedding_bytes']:,}"]
    assert model["embedding bytes, before and after"] == expected
    assert table_below(text, "Protocol")["`search.method`"] == ['`"optfs"`']
    (auc,) = (one for one in result["run_record"]["metrics"] if one["metric"] == "auc")
    assert f"| test | `click` | AUC | {auc['value']:.5f} | {auc['low']:.5f} to {auc['high']:.5f} |" in text
    assert run_code(tmp_path / "o")["probabilities"].height == 1


def test_a_warm_start_and_sampled_negatives_are_limits(home: Path, tmp_path: Path) -> None:
    words = ["train", home / "data", "--out", tmp_path / "run", "--model", "mlp", "--dim", "4", "--hidden", "8"]
    words += ["--epochs", "1", "--no-baselines", "--warm-start", home / "run", "--keep-negatives", "0.5"]
    words += ["--calibrate", "False"]
    assert cli.main([*map(str, words)]) == 0
    text = (tmp_path / "run" / "README.md").read_text()
    assert f"started from the weights of `{home / 'run'}`." in text
    assert "trained on 0.5 of the rows without a click" in text
    assert "Beside simple models" not in text and "No calibrator was fitted." in text


def test_an_export_carries_the_card_and_runs(home: Path, tmp_path: Path) -> None:
    about = export_model(home / "run", tmp_path / "out", to="pt2")
    text, theirs = ((folder / "README.md").read_text() for folder in (tmp_path / "out", home / "run"))
    assert text.startswith("---\nlibrary_name: ctrlib\n") and "# `mlp` for `click`, exported" in text
    assert text.partition("\n## Model\n")[2] == theirs.partition("\n## Model\n")[2]
    export = table_below(text, "Export")
    assert export["bytes"] == [f"{about['bytes']:,}"]
    assert export["largest difference of a logit, 16 rows"] == [f"{about['parity']['rows']['16']:.1e}"]
    found = run_code(tmp_path / "out")["probabilities"]
    expected, _ = ctr.Predictor.load(home / "run").predict(dict.fromkeys(["item", "us|er", "price"]))
    np.testing.assert_allclose(found[:, 0], expected["click"].to_numpy(), rtol=1e-6)


def test_an_export_of_a_model_without_card_says_so(home: Path, tmp_path: Path) -> None:
    ctr.save_model(ctr.models.build(CONFIG, ctr.Schema.load(home / "data")), CONFIG, home / "data", tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    export_model(tmp_path / "model", tmp_path / "out", to="pt2")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The model folder had no card" in text and "# A model for `click`, exported" in text


def test_the_estimators_card_has_no_path_that_is_gone(tmp_path: Path) -> None:
    rows = frame(200)
    fitted = ctr.CTRClassifier("mlp", max_epochs=1, config={"hidden": [8]}).fit(rows.drop("click"), rows["click"])
    fitted.save(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert table_below(text, "Data")["data"] == ["`rows given to CTRClassifier.fit`"]
    (auc,) = (one for one in fitted.result_["run_record"]["metrics"] if one["metric"] == "auc")
    assert f"| valid | `click` | AUC | {auc['value']:.5f} |" in text and "| test |" not in text
    assert text.count("| valid | `click` | AUC |") == 1
    assert str(fitted._fitted.folder.parent / "ctrlib-") not in text.partition("## Versions")[0]


def test_a_model_of_a_log_names_its_last_event_and_its_lines_run(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, times, last in (
        ("dates", pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 2), "5m", eager=True), "2024-01-02"),
        ("numbers", pl.Series(range(289)), "288"),
    ):
        log = frame(289).with_columns(times.alias("ts"), pl.Series("user", random.integers(0, 9, 289)))
        events = Events("ts", [History("item", by="user", max_length=3)], ["item"])
        ctr.prepare(log.drop("us|er"), tmp_path / name, labels="click", events=events, split_by="ts", log=None)
        config = {"model": "mlp", "embedding_dim": 4, "hidden": [8]}
        model = ctr.models.build(config, ctr.Schema.load(tmp_path / name))
        ctr.save_model(model, config, tmp_path / name, tmp_path / f"{name} model")
        text = (tmp_path / f"{name} model" / "README.md").read_text()
        assert re.search(rf"events up to '?{last}.*, when this was written", text)
        names = run_code(tmp_path / f"{name} model")
        assert str(names["row"]["ts"]).startswith(last) and names["probabilities"].height == 1


def test_models_of_ones_own_are_loaded_with_their_modules(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "shop_of_cards.py").write_text(
        "import ctrlib as ctr\n\n\ndef small(inputs, *, width=8):\n    embedding = inputs.embedding()\n"
        "    return inputs.model(embedding, ctr.MLP(embedding.out_shape, hidden=(width,)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = {"model": "shop_of_cards.small", "embedding_dim": 4}
    schema = ctr.Schema.load(home / "data")
    model = ctr.models.build(config, schema, modules=["shop_of_cards"])
    ctr.save_model(model, config, home / "data", tmp_path / "own", modules=["shop_of_cards"])
    text = (tmp_path / "own" / "README.md").read_text()
    assert "modules=['shop_of_cards']" in text and "ctrlib predict" not in text  # the command line loads no such model
    assert run_code(tmp_path / "own")["probabilities"].height == 1


def test_several_labels_have_a_line_each(tmp_path: Path) -> None:
    rows = frame(600).with_columns(buy=(pl.col("click") * pl.Series(np.arange(600) % 2)))
    ctr.prepare(rows, tmp_path / "data", labels=["click", "buy"], log=None)
    config = {"model": "shared_bottom", "embedding_dim": 4, "training": TRAINING}
    with model_saved(tmp_path / "data", config, tmp_path / "model") as result:
        text = (tmp_path / "model" / "README.md").read_text()
    for label in ("click", "buy"):
        (auc,) = (o for o in result["run_record"]["metrics"] if (o["metric"], o["label"]) == ("auc", label))
        assert f"| test | `{label}` | AUC | {auc['value']:.5f} |" in text
    assert f"| valid | mean of labels | AUC | {result['valid_auc']:.5f} |" in text
    assert "the probability of each of `click`, `buy`" in text


@contextlib.contextmanager
def model_saved(data: Path, config: dict[str, Any], out: Path) -> Iterator[dict[str, Any]]:
    _, result = ctr.run(data, config, out=out, saving=lambda model: model_in_the_making(model, config, data, out))
    yield result


def test_a_retrieval_folder_has_one_as_well(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pairs = pl.DataFrame({"user": random.integers(0, 30, 400), "item": random.integers(0, 20, 400)}).unique()
    pairs.write_csv(tmp_path / "log.csv")
    words = ["retrieve", "train", tmp_path / "log.csv", "--method", "popularity", "--out", tmp_path / "run"]
    assert cli.main([*map(str, words)]) == 0
    text = (tmp_path / "run" / "README.md").read_text()
    record = load(tmp_path / "run").record
    assert table_below(text, "Model")["`method`"] == ['`"popularity"`']
    assert table_below(text, "Data")["pairs"] == [f"`{pairs.height}`"]
    (recall,) = (one for one in record["run_record"]["metrics"] if one["metric"] == "recall@20")
    assert f"| `recall@20` | {recall['value']:.5f} |" in text
    assert run_code(tmp_path / "run")["trained"].log.counts["users"] == load(tmp_path / "run").log.counts["users"]


def test_the_card_of_the_command_line_is_valid_yaml_and_needs_nothing_else(home: Path) -> None:
    front = (home / "run" / "README.md").read_text().split("---\n")[1]
    assert front.splitlines()[:3] == ["library_name: ctrlib", "pipeline_tag: tabular-classification", "tags:"]
    code = code_of((home / "run" / "README.md").read_text())
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(probabilities.height)"],
        cwd=home / "run",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1"]
