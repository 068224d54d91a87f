"""The search command from data to model folder, what a kill leaves, the floors beside it, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.distributed import world_size
from ctrlib.plots import search_result
from ctrlib.schema import NUM_RESERVED_IDS
from ctrlib.search import optembed, optfs
from ctrlib.search.bytes import bytes_of
from ctrlib.search.counting import count_reads
from ctrlib.search.experiment import settings_of
from ctrlib.search.floors import keep_rows, row_norms
from ctrlib.search.methods import SEARCHES
from ctrlib.search.optembed import OptEmbed
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.run import search_and_retrain
from ctrlib.search.stages import search_epochs
from ctrlib.serving.predictor import Predictor
from ctrlib.training.exact import ExactEngine

ROOT = Path(__file__).parent.parent
QUIET = Console(quiet=True)
CONFIG = {"model": "deepfm", "embedding_dim": 4, "hidden": (8,)}
OPTFS = {"penalty": 3e-3, "epochs": 3, "learning_rate": 1e-2}
pytestmark = pytest.mark.usefixtures("drawn_pictures")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fields that matter, of few values, and one of many that does not; rows in three splits."""
    folder = tmp_path_factory.mktemp("search") / "data"
    rng = np.random.default_rng(0)
    good, noise = rng.integers(0, 15, (9000, 2)), rng.integers(0, 200, 9000)
    effects = rng.normal(size=(2, 15)) * 1.5
    logits = effects[[0, 1], good].sum(1)
    labels = (rng.random(9000) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    frame = pl.DataFrame({"a": good[:, 0], "b": good[:, 1], "noise": noise, "label": labels})
    splits = {"train": frame[:6000], "valid": frame[6000:7500], "test": frame[7500:]}
    ctr.prepare(splits, folder, features=[ctr.Categorical(n) for n in ("a", "b", "noise")], labels="label", log=None)
    return folder


def build(data: Path, seed: int = 0) -> ctr.Model:
    torch.manual_seed(seed)
    return models.build(CONFIG, ctr.Schema.load(data))


def loaders(data: Path) -> tuple[ctr.Loader, ctr.Loader]:
    return (
        ctr.Loader(data, "train", batch_size=200, shuffle=True, workers=0),
        ctr.Loader(data, "valid", batch_size=2000, workers=0),
    )


def test_the_command_makes_a_model_that_serves(data: Path, tmp_path: Path, capsys: Any) -> None:
    """And search.json, the words and the picture say what it is."""
    out = tmp_path / "small"
    arguments = ["search", "optfs", str(data), "--out", str(out), "--dim", "4", "--hidden", "8", "--batch-size", "200"]
    arguments += ["--learning-rate", "0.005", "--epochs", "4", "--setting", "penalty=2e-3", "epochs=5", "--json"]
    plain = arguments[: arguments.index("--setting")]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((out / "search.json").read_text(encoding="utf-8")) == result
    assert result["settings"]["learning_rate"] == 0.005 and result["settings"]["epochs"] == 5
    kept = {name: some for name, (some, _) in result["summary"]["kept"].items()}
    assert min(kept["a"], kept["b"]) >= 14 and kept["noise"] < 50
    assert result["summary"]["words"][0].startswith(f"{sum(kept.values())} of 230 values are kept")
    assert (out / "search.png").stat().st_size > 8000
    assert not (out / "search").exists() and not (out / "checkpoints").exists()
    predictor = Predictor.load(out)
    scores = predictor.evaluate_prepared(data, "test")
    assert scores["auc"] == pytest.approx(result["test_auc"], abs=1e-12)
    assert bytes_of(predictor.model).embedding == result["embedding_bytes"] < result["embedding_bytes_before"]  # type: ignore[arg-type]
    raw = pl.DataFrame({"a": [3, 999], "b": [4, 5], "noise": [7, 12345]})
    probabilities, counts = predictor.predict(raw)
    assert probabilities["label"].is_between(0, 1).all() and counts["unseen"] == {"a": 1, "b": 0, "noise": 1}
    for more, complaint in (
        ([], "is a folder of `ctrlib search` already: give another --out, or --overwrite"),
        (["--overwrite", "--setting", "lambda=1"], "optfs has no setting ['lambda']; the closest are "),
    ):
        assert cli.main([*(arguments if not more else plain), *more]) == 1
        assert complaint in capsys.readouterr().err


def test_a_killed_search_goes_on_with_the_same_bits(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Killed in the middle of the search, and again in the retraining."""
    settings = settings_of("optfs", OPTFS)

    def run(out: Path) -> dict[str, Any]:
        return search_and_retrain(
            "optfs", data, CONFIG, out, settings=settings, batch_size=200, max_epochs=3, console=QUIET
        )

    whole = run(tmp_path / "whole")
    epochs = []

    class Killed(Exception):
        pass

    def kill_in_epoch(number: int) -> Any:
        step, steps = ExactEngine.step, [0]

        def killed(self: ExactEngine, batch: ctr.Batch) -> torch.Tensor:
            steps[0] += 1
            if steps[0] == 30 * number - 5:  # 30 batches an epoch
                raise Killed
            return step(self, batch)

        return killed

    for number in (2, 4):  # the second epoch of the search; of what is left then, the second of the retraining
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(ExactEngine, "step", kill_in_epoch(number))
            run(tmp_path / "killed")
        epochs.append(sorted(path.name for path in (tmp_path / "killed").iterdir()))
    assert epochs[0] == ["search", "unfinished.json"] and "plan.safetensors" in epochs[1] and "checkpoints" in epochs[1]
    again = run(tmp_path / "killed")
    assert again == whole
    one, other = (Plan.load(tmp_path / name / "plan.safetensors") for name in ("whole", "killed"))
    assert one.summary == other.summary and one.replaced == other.replaced
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())
    models = [Predictor.load(tmp_path / name).model.state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_a_finished_plan_is_not_searched_again(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Unless it is of another search."""
    options: dict[str, Any] = {"batch_size": 200, "max_epochs": 1, "console": QUIET}
    settings = settings_of("optfs", {**OPTFS, "epochs": 2})
    first = search_and_retrain("optfs", data, CONFIG, tmp_path, settings=settings, **options)
    real, searched = optfs.search, []

    def watched(*arguments: Any, **named: Any) -> Plan:
        searched.append(named["seed"])
        return real(*arguments, **named)

    monkeypatch.setattr(optfs, "search", watched)
    assert search_and_retrain("optfs", data, CONFIG, tmp_path, settings=settings, **options) == first
    assert searched == []
    search_and_retrain("optfs", data, CONFIG, tmp_path, settings=settings, seed=1, **options)
    assert searched == [1]


TINY: dict[str, dict[str, Any]] = {
    "optfs": {"epochs": 2},
    "optembed": {"epochs": 1, "generations": 1, "parents": 2, "mutations": 1, "crossovers": 1},
    "dnis": {"warm_epochs": 1, "epochs": 1, "ratio": 1.5, "blocks": 2},
    "optinter": {"epochs": 1},
}


@pytest.mark.parametrize("method", SEARCHES)
def test_every_method_goes_the_whole_road(method: str, data: Path, tmp_path: Path) -> None:
    """What is written is the model whose scores and bytes are reported; the summary has words and something to draw."""
    result = search_and_retrain(
        method,
        data,
        CONFIG,
        tmp_path,
        settings=settings_of(method, TINY[method]),
        batch_size=500,
        max_epochs=1,
        console=QUIET,
    )
    predictor = Predictor.load(tmp_path)
    assert predictor.evaluate_prepared(data, "test")["auc"] == pytest.approx(result["test_auc"], abs=1e-12)
    assert bytes_of(predictor.model).embedding == result["embedding_bytes"]  # type: ignore[arg-type]
    tensors = {id(t): t.numel() * t.element_size() for t in (*predictor.model.parameters(), *predictor.model.buffers())}
    assert sum(result["bytes_after"].values()) == sum(tensors.values())
    summary = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))["summary"]
    assert summary["words"] and {"kept", "dims", "pairs"} & summary.keys()
    assert (tmp_path / "search.png").stat().st_size > 8000


def test_floors_keep_the_best_rows_within_the_budget(data: Path) -> None:
    """To within a row of each table, by whatever score; vocabularies are cut by frequency without a map of ids."""
    train, _ = loaders(data)
    model = build(data)
    budget = bytes_of(model).embedding // 3
    scores = {"reads": count_reads(train.schema, train), "magnitude": row_norms(model, train.schema)}
    kinds = {}
    for name, score in scores.items():
        plan = keep_rows(model, train.schema, score, num_bytes=budget, method=name)
        smaller = materialise(model, plan)
        size = bytes_of(smaller).embedding
        assert budget - 60 < size <= budget
        tables = {t["name"]: t for t in plan.replaced["embedding.tables"]["tables"]}
        kinds[name] = {t["kept"] for t in tables.values()}
        kept = {table: t["num_kept"] or t["rows"] for table, t in tables.items()}
        # All above some score, and none below it.
        dropped = sum(len(score[n]) for n in score) - sum(kept.values())
        every = torch.cat([score[n][NUM_RESERVED_IDS:] for n in score]).sort().values
        for n in score:
            (number,) = (kept[table] for table, t in tables.items() if n in t["feature_names"])
            values = score[n][NUM_RESERVED_IDS:]
            number -= NUM_RESERVED_IDS
            assert int((values > every[dropped]).sum()) <= number <= int((values >= every[dropped]).sum())
    assert "some" not in kinds["reads"] and "some" in kinds["magnitude"]
    counts = torch.zeros(scores["reads"]["noise"].shape)
    for batch in train:
        counts += torch.bincount(batch.sparse["noise"].values(), minlength=len(counts))
    assert torch.equal(scores["reads"]["noise"], counts)
    with pytest.raises(ValueError, match="bytes do not even hold the reserved rows, which take"):
        keep_rows(model, train.schema, scores["reads"], num_bytes=100, method="reads")


def test_several_processes_are_refused(data: Path, monkeypatch: Any) -> None:
    from ctrlib.search import stages

    assert world_size() == 1
    monkeypatch.setattr(stages, "world_size", lambda: 2)
    train, valid = loaders(data)
    with pytest.raises(NotImplementedError, match="searches run in one process, and 2 were started"):
        optfs.search(build(data), train, valid)


def test_a_search_stops_at_a_loss_that_is_not_finite(data: Path) -> None:
    train, _ = loaders(data)
    model = build(data)
    model.head.register_forward_hook(lambda module, inputs, logits: logits * torch.nan)
    with pytest.raises(ctr.training.NonFiniteLossError, match="search, epoch 1, batch 0: the loss is nan"):
        search_epochs(ExactEngine(model), train, 2, console=QUIET)


def test_what_has_no_tables_is_refused(data: Path) -> None:
    train, valid = loaders(data)
    model = models.build(
        {**CONFIG, "model": "mlp", "tables": {"kind": "memcom", "num_embeddings": 10}}, ctr.Schema.load(data)
    )
    for method in (optfs, optembed):
        with pytest.raises(ValueError, match="has no table of its own for each vocabulary"):
            method.search(model, train, valid, console=QUIET)
    small = materialise(
        build(data),
        keep_rows(build(data), train.schema, count_reads(train.schema, train), num_bytes=2000, method="reads"),
    )
    with pytest.raises(ValueError, match="no table"):
        optfs.search(small, train, valid, console=QUIET)


def test_settings_and_pictures_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown method 'pep'; the closest are optinter, optembed, optfs; expected some of"
    ):
        settings_of("pep", {})
    summary = {"fields": ["a", "b"], "choice": [[None, "memorise"], ["memorise", None]]}
    result = {"method": "optinter", "test_auc": 0.8, "ratio": 2.0}
    search_result({**result, "summary": {"pairs": summary, "dims": {"a": 3, "b": 1.5}}}, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 8000
    with pytest.raises(ValueError, match="has none of kept, dims and pairs to draw"):
        search_result({**result, "summary": {}}, tmp_path / "search.png")
    assert set(SEARCHES) == {"optfs", "optembed", "dnis", "optinter"}


def test_another_evolution_asks_the_supernet_that_is_there(data: Path, tmp_path: Path) -> None:
    """Its checkpoints stay where they were asked to, and no epoch is trained again."""
    found = []
    for generations in (1, 0):
        said = io.StringIO()
        settings = OptEmbed(epochs=2, generations=generations, parents=4, learning_rate=1e-2, price=0.0)
        out, console = tmp_path / str(generations), Console(file=said, width=200)
        options = {"max_epochs": 1, "batch_size": 500, "checkpoints": tmp_path / "supernet", "console": console}
        found.append(search_and_retrain("optembed", data, CONFIG, out, settings=settings, **options))
        assert ("search epoch" in said.getvalue()) == (generations == 1)
        assert not (out / "search").exists() and any((tmp_path / "supernet").iterdir())
    assert found[0]["summary"]["kept"] == found[1]["summary"]["kept"]
    assert found[0]["summary"]["candidates"] > found[1]["summary"]["candidates"] == 4


def test_the_recipe_compares_over_seeds(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models of each seed beside each other, on data with a twin of every field; a second call trains nothing."""
    spec = importlib.util.spec_from_file_location("recipes_search", ROOT / "recipes" / "search.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look their module up there
    spec.loader.exec_module(script)
    setting = script.Setting(
        CONFIG, {"batch_size": 500, "embedding_l2": 0.0, "learning_rate": 1e-2}, methods={"optfs": OPTFS}
    )
    monkeypatch.setitem(script.SETTINGS, "frappe_x1_noise", setting)
    knobs = script.Knobs("optfs", "frappe_x1_noise", tmp_path, data=data, seeds=(1, 2), epochs=2)
    script.main(knobs)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    floors = ["untouched", *(f"{rule} to the bytes of optfs" for rule in ("frequency cut", "magnitude pruning"))]
    tuned = [f"{name}, fine-tuned" for name in floors]
    names = [floors[0], "optfs", tuned[0], *(name for pair in zip(floors[1:], tuned[1:]) for name in pair)]
    assert [(line["model"], line["seed"]) for line in said[:14]] == [(name, seed) for seed in (1, 2) for name in names]
    by_name = {(line["model"], line["seed"]): line for line in said[:14]}
    for seed in (1, 2):  # fine-tuned as long as that is better
        assert by_name[tuned[0], seed]["valid_auc"] >= by_name[floors[0], seed]["valid_auc"]
    for line in said[14:]:
        _, other = line["model"].split(" - ")
        apart = [by_name["optfs", seed]["test_auc"] - by_name[other, seed]["test_auc"] for seed in (1, 2)]
        assert line["of_each_seed"] == pytest.approx(apart, abs=1e-9)
        assert line["difference"] == pytest.approx(sum(apart) / 2)
        assert len(line["p_over_rows"]) == 2
    assert len(said) == 14 + 6
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    script.main(knobs)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    twins = {split: pl.read_parquet(tmp_path / "frappe_x1_noise_data" / split) for split in ("train", "test")}
    for rows in twins.values():
        for name in ("a", "b", "noise"):
            assert rows[name].sort().equals(rows[f"{name}_noise"].sort().rename(name))
    train = twins["train"]
    # A twin's fields are another row's: related to each other, and not to the label.
    together = train.select("a", "b").rows()
    assert sorted(together) == sorted(train.select("a_noise", "b_noise").rows())
    assert train["a"].ne(train["a_noise"]).mean() > 0.8
