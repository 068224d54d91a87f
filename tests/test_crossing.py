"""Pairs that a ranking finds, through preparation and training to scores; and what no pair is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import ctrlib as ctr
from ctrlib import cli
from ctrlib.errors import ArgumentError
from ctrlib.ranking import crosses
from ctrlib.serving.model_folder import load_model
from ctrlib.training.crossing import check_pairs, crossed

ROWS = 6_000


class Flat(nn.Module):
    """Fields side by side: with a linear head, no feature knows of another."""

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        self.in_shape, self.out_shape = in_shape, (in_shape[0] * in_shape[1],)

    def forward(self, fields: torch.Tensor) -> torch.Tensor:
        """(B, F, D) -> (B, F * D)."""
        return fields.flatten(1)


def logistic(inputs: ctr.Inputs) -> ctr.Model:
    """Logistic regression on the fields."""
    embedding = inputs.embedding()
    return inputs.model(embedding, Flat(embedding.out_shape))


OWN = {
    "model": "test_crossing.logistic",
    "embedding_dim": 4,
    "training": {"batch_size": 256, "learning_rate": 0.02, "max_epochs": 4, "seed": 1},
}


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The label is 1 more often where two columns differ in parity; each alone tells nothing. `copy` is the label."""
    rng = np.random.default_rng(4)
    left, right, brand, noise = (rng.integers(0, values, ROWS) for values in (6, 6, 9, 20))
    click = rng.random(ROWS) < np.where((left ^ right) % 2, 0.6, 0.1) + 0.1 * (brand % 3 == 0)
    columns = {"left": left, "right": right, "brand": brand, "noise": noise, "copy": click}
    frame = pl.DataFrame({name: [f"{name}{code:d}" for code in codes] for name, codes in columns.items()})
    price = rng.normal(size=ROWS) + 0.5 * click
    folder = tmp_path_factory.mktemp("crossing")
    frame.with_columns(price=price, click=click.astype(int)).write_csv(folder / "clicks.csv")
    arguments = ["--label", "click", "--categorical", "copy", "--out", str(folder / "ranking")]
    assert cli.main(["rank", str(folder / "clicks.csv"), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def best(clicks: Path) -> Path:
    """Prepared with the best four of the ranking, which know what is to be crossed."""
    out = clicks / "best"
    arguments = ["--label", "click", "--from-ranking", str(clicks / "ranking"), "--top", "4", "--out", str(out)]
    assert cli.main(["prepare", str(clicks / "clicks.csv"), *arguments]) == 0
    return out


def test_a_ranking_hands_over_what_it_found(clicks: Path, best: Path) -> None:
    assert crosses(clicks / "ranking") == [("left", "right")]
    assert json.loads((best / "report.json").read_text())["crosses"] == [["left", "right"]]
    assert {feature.name for feature in ctr.Schema.load(best).features} == {"left", "right", "brand", "price"}


def test_of_several_labels_pairs_come_in_turn_without_leaks_and_numbers(clicks: Path, tmp_path: Path) -> None:
    content = json.loads((clicks / "ranking" / "ranking.json").read_text())
    (one,) = content["labels"]
    (found,) = (pair for pair in one["pairs"] if {pair["first"], pair["second"]} == {"left", "right"})
    made = [("brand", "left", 3.0, 0.01), ("price", "left", 2.0, 0.01), ("copy", "left", 2.0, 0.01)]
    made += [("brand", "right", 1.0, 0.01), ("noise", "left", 4.0, 0.2), ("noise", "right", 4.0, None)]
    made += [("noise", "brand", -1.0, 0.01)]
    second = [{**found, "first": a, "second": b, "synergy": synergy, "q": q} for a, b, synergy, q in made]
    content["labels"].append({**one, "label": "buy", "pairs": second[::-1]})
    (tmp_path / "ranking.json").write_text(json.dumps(content))
    assert crosses(tmp_path) == [("left", "right"), ("brand", "left"), ("brand", "right")]


def test_pairs_of_features_that_are_not_taken_are_not_handed_over(clicks: Path, tmp_path: Path) -> None:
    raw, ranking = str(clicks / "clicks.csv"), ["--label", "click", "--from-ranking", str(clicks / "ranking")]
    for arguments in (["--top", "4", "--ignore", "left"], ["--top", "1"], ["--top", "4", "--multi", "left"]):
        out = tmp_path / "-".join(arguments)
        assert cli.main(["prepare", raw, *ranking, *arguments, "--out", str(out)]) == 0
        assert "crosses" not in json.loads((out / "report.json").read_text())


def test_logistic_regression_learns_an_exclusive_or_by_its_cross(clicks: Path, best: Path, tmp_path: Path) -> None:
    """Without, no better than what brand and price tell; with, as good as the rule. It scores raw rows the same."""
    _, plain = ctr.run(best, OWN, modules=["test_crossing"])
    config = {**OWN, "crosses": [["left", "right"]]}
    model, result = ctr.run(best, config, modules=["test_crossing"])
    assert plain["test_auc"] < 0.7
    assert result["test_auc"] > 0.77
    assert result["parameters"] - plain["parameters"] == (36 + 1) * 8 + 8 * 3 * 4  # 36 crosses and all others; P
    ctr.save_model(model, config, best, tmp_path / "model", modules=["test_crossing"])
    predictor = ctr.Predictor.load(tmp_path / "model", modules=["test_crossing"])
    frame = pl.read_csv(clicks / "clicks.csv")
    scores = predictor.predict(frame.drop("click"))[0]["click"].to_numpy()
    assert ctr.metrics.auc(frame["click"].to_numpy(), scores) > 0.77
    differ = frame.with_columns(left=pl.lit("never seen"))
    one = predictor.predict(differ.with_columns(right=pl.lit("right0")))[0]["click"].to_numpy()
    assert np.abs(one - scores).max() > 0.2  # it reads the row of all other crosses


def test_the_commands_from_end_to_end(clicks: Path, best: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, raw = tmp_path / "model", str(clicks / "clicks.csv")
    how = ["--model", "fm", "--dim", "4", "--epochs", "1", "--seed", "2"]
    assert cli.main(["train", str(best), *how, "--crosses", "ranked", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    content = json.loads((out / "model.json").read_text())
    assert content["crosses"] == [["left", "right"]]
    assert content["replaced"]["embedding.tables"]["num_crosses"] == 36
    assert cli.main(["predict", str(out), raw, "--out", str(tmp_path / "scores.csv")]) == 0
    assert pl.read_csv(tmp_path / "scores.csv").height == ROWS
    # The experiment of a crossed model is one: its crosses are counted anew, on the same data or on other.
    again = ["--config", str(out / "model.json"), "--out", str(tmp_path / "again"), "--json"]
    capsys.readouterr()
    assert cli.main(["train", str(best), *again]) == 0
    assert json.loads(capsys.readouterr().out)["test_auc"] == result["test_auc"]
    assert json.loads((tmp_path / "again" / "model.json").read_text()) == content
    assert cli.main(["search", "optfs", str(best), "--config", str(out / "model.json")]) == 1
    assert "take the model.json of the one that it came from" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["train", str(best), *how, "--crosses", "ranked:1", "brand:left", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["crosses"] == [["left", "right"], ["brand", "left"]]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["left"], "expected two features, such as user:item, or ranked"),
        (["ranked:2"], "expected a number from 1 to 1"),
        (["ranked:x"], "expected a number from 1 to 1"),
        (["left:rihgt"], "'rihgt' is no categorical feature"),
        (["left:price"], "'price' is no categorical feature"),
        (["left:left"], "is no pair of two features"),
        (["left:right", "ranked"], "comes twice"),
    ],
)
def test_what_is_no_pair_is_refused(
    best: Path, tmp_path: Path, said: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--model", "fm", "--crosses", *said, "--out", str(tmp_path / "model")]
    assert cli.main(["train", str(best), *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_ranked_needs_a_ranking(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "prepared"
    assert cli.main(["prepare", str(clicks / "clicks.csv"), "--label", "click", "--out", str(out)]) == 0
    assert cli.main(["train", str(out), "--crosses", "ranked", "--out", str(tmp_path / "model")]) == 1
    assert "prepare it with --from-ranking" in " ".join(capsys.readouterr().err.split())


def test_names_with_colons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({name: [f"v{code}" for code in rng.integers(0, 5, 300)] for name in ("a:b", "c", "d:e")})
    ctr.prepare(frame.with_columns(label=rng.integers(0, 2, 300)), tmp_path / "data", log=None)
    for text, pair in (("a:b:c", ["a:b", "c"]), ("c:a:b", ["c", "a:b"]), ("a:b:d:e", ["a:b", "d:e"])):
        assert cli.main(["train", str(tmp_path / "data"), "--crosses", text, "--print-config"]) == 0
        assert json.loads(capsys.readouterr().out)["crosses"] == [pair]


def test_tables_stay_as_they_are_and_crosses_begin_at_nothing_much(best: Path) -> None:
    schema = ctr.Schema.load(best)
    torch.manual_seed(0)
    model = ctr.models.fm(ctr.Inputs(schema, embedding_dim=4, stacked=2))
    changed = crossed(model, best, [["left", "right"], ["brand", "left"]], min_count=10_000)
    assert changed.embedding.tables.vectors.num_crosses == 0
    batch = next(iter(ctr.Loader(best, "train", batch_size=64)))
    torch.testing.assert_close(changed(batch), model(batch), atol=1e-6, rtol=0)
    changed = crossed(model, best, [["left", "right"]])
    train = pl.read_parquet(best / "train")
    codes = (train["left"].to_numpy().astype(np.int64) * schema["right"].num_embeddings) + train["right"].to_numpy()
    values, times = np.unique(codes, return_counts=True)
    assert changed.embedding.tables.vectors.codes.tolist() == values[times >= 2].tolist()


def test_the_fused_engine_trains_crosses(best: Path) -> None:
    config = {"model": "fm", "embedding_dim": 4, "crosses": [["left", "right"]]}
    config = ctr.models.for_engine(config, "fused")
    model, result = ctr.run(
        best, {**config, "training": {"engine": "fused", "batch_size": 256, "max_epochs": 3, "learning_rate": 0.02}}
    )
    assert result["test_auc"] > 0.77
    assert model.embedding.tables.vectors.num_crosses == 36


def test_what_cannot_be_crossed_is_refused(best: Path, tmp_path: Path) -> None:
    schema = ctr.Schema.load(best)
    with pytest.raises(ArgumentError, match=r"crosses: 'left' is no pair of two features"):
        check_pairs(["left"], schema)
    with pytest.raises(ArgumentError, match=r"comes twice"):
        check_pairs([("left", "right"), ("right", "left")], schema)
    with pytest.raises(ArgumentError, match=r"are counted on the data before there is a model"):
        ctr.models.build({"model": "fm", "crosses": [["left", "right"]]}, schema)
    hashed = {
        "model": "fm",
        "tables": {"kind": "quotient_remainder", "num_embeddings": 12},
        "crosses": [["left", "right"]],
    }
    with pytest.raises(ArgumentError, match=r"crossed beside the plain tables of a TableEmbedding"):
        ctr.run(best, hashed)
    frame = pl.DataFrame({"item": ["a", "b"] * 9, "price": np.arange(18.0) / 7, "label": [0, 1] * 9})
    with pytest.raises(ctr.SchemaError, match=r"crosses: 'price' is numeric, expected a categorical feature"):
        ctr.prepare(frame, tmp_path / "data", crosses=[("item", "price")], log=None)
    with pytest.raises(ctr.SchemaError, match=r"crosses: 'shop' is no feature"):
        ctr.prepare(frame, tmp_path / "data", crosses=[("item", "shop")], log=None)


def test_a_crossed_model_is_read_as_it_was(best: Path, tmp_path: Path) -> None:
    config = {"model": "fm", "embedding_dim": 4, "crosses": [["left", "right"]], "training": {"max_epochs": 1}}
    model, _ = ctr.run(best, config)
    ctr.save_model(model, config, best, tmp_path / "model")
    read, _ = load_model(tmp_path / "model")
    batch = next(iter(ctr.Loader(best, "test", batch_size=64)))
    assert torch.equal(read(batch), model.eval()(batch))
