"""What the recipes train beside ctrlib's own: DINs of other libraries on the same rows, and rivals of UltraGCN."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ctrlib as ctr
import histories
import retrieval
from ctrlib.retrieval.interactions import Interactions
from din import Batches, Data

ROWS = pl.DataFrame(
    {
        "label": [0, 1, 1, 0],
        "item": ["a", "b", "a", "c"],
        "tags": ["x|y", None, "y", "y"],
        "seen": ["b|a", "", "c|a|b", "a"],
    }
)
FEATURES = [ctr.Categorical("item"), ctr.MultiValued("tags"), ctr.Sequence("seen", vocabulary="item", max_length=2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ctr.prepare({"train": ROWS, "valid": ROWS[:2], "test": ROWS[2:]}, tmp_path / "data", features=FEATURES, log=None)
    return tmp_path / "data"


def test_a_peer_gets_the_rows_and_its_result_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peers").mkdir()
    peer = """
        import json, pathlib, shutil, sys
        folder = pathlib.Path(sys.argv[1])
        shutil.copytree(folder, {copy!r})
        found = {{"valid_auc": 0.7, "test_auc": 0.6, "seconds": 2.0, "note": "peer 1.0"}}
        (folder / "result.json").write_text(json.dumps(found))
    """
    code = "\n".join(line.strip() for line in peer.format(copy=str(tmp_path / "given")).splitlines())
    (tmp_path / "peers" / "rechub_din.py").write_text(code)
    monkeypatch.setattr(histories, "__file__", str(tmp_path / "histories.py"))
    knobs = histories.Knobs(peer="rechub", peer_python=Path(sys.executable), seed=5, record=True)
    histories.run_peer(knobs, folder, l2=0.5)

    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["seed"], said["test_auc"]) == ("din of rechub", 5, 0.6)
    (row,) = pl.read_csv(tmp_path / "results.csv", infer_schema=False).to_dicts()
    assert (row["model"], row["seed"], row["test_auc"], row["note"]) == ("din of rechub", "5", "0.6", "peer 1.0")
    assert row["data_hash"] == ctr.Schema.load(folder).hash

    given = Data(tmp_path / "given")
    assert [(f["name"], f["kind"], f["table"], f.get("length")) for f in given.features] == [
        ("item", "id", "item", None),
        ("tags", "bag", "tags", 50),
        ("seen", "history", "item", 2),
    ]
    assert given.features[0]["rows"] == given.features[2]["rows"] == 6  # padding, missing, unseen, a, b, c
    assert (given.l2, given.pairs()) == (0.5, [("item", "seen")])
    (batch,) = Batches(given, "valid")
    assert batch["label"].tolist() == [0, 1]
    a, b = batch["item"].tolist()
    assert batch["seen"].tolist() == [[b, a], [0, 0]]
    x, y, *rest = batch["tags"][0].tolist()
    assert x != y and min(x, y) >= 3 and not any(rest)
    assert batch["tags"][1, 0] == 1 and not batch["tags"][1, 1:].any()
    (shuffled,) = Batches(given, "train")
    assert shuffled["label"].sum() == 2 and len(Batches(given, "train")) == 1


@pytest.mark.parametrize(
    "knobs",
    [
        {"peer": "rechub"},
        {"peer": "fuxictr", "peer_python": Path("python")},
        {"peer": "rechub", "peer_python": Path("python"), "peer_source": Path("source")},
    ],
)
def test_a_peer_without_its_place_is_refused(knobs: dict[str, Any], folder: Path) -> None:
    with pytest.raises(SystemExit, match="--peer needs --peer-python, and fuxictr, and only that, --peer-source"):
        histories.run_peer(histories.Knobs(**knobs), folder, l2=0)


@pytest.mark.parametrize(
    "knobs", [{"data_set": "planted_interests"}, {"data_set": "movielens_1m_histories", "peer": "rechub"}]
)
def test_an_average_without_an_l2_of_its_own_is_refused(knobs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="L2 tuned for it: movielens_1m_histories"):
        histories.main(histories.Knobs(average=True, data=tmp_path / "data", **knobs))
    assert not list(tmp_path.iterdir())


def test_a_peer_that_fails_is_quoted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "rechub_din.py").write_text("raise RuntimeError('no such thing')")
    monkeypatch.setattr(histories, "__file__", str(tmp_path / "histories.py"))
    with pytest.raises(SystemExit, match=r"rechub_din.py failed; (.|\n)*RuntimeError: no such thing"):
        histories.run_peer(histories.Knobs(peer="rechub", peer_python=Path(sys.executable)), folder, l2=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_lightgcn_is_the_mean_of_layers_and_learns() -> None:
    random = np.random.default_rng(0)
    group = random.integers(0, 2, 40)
    matrix = (random.random((40, 30)) < np.where(group[:, None] == np.arange(30) % 2, 0.5, 0.05)).astype(np.float32)
    log = Interactions.of_matrix(matrix)
    rival = retrieval.LightGCN(log, seed=1)
    graph = np.zeros((70, 70))
    graph[:40, 40:], graph[40:, :40] = matrix, matrix.T
    scale = 1 / np.sqrt(np.maximum(graph.sum(1), 1))
    graph = scale[:, None] * graph * scale
    vectors = rival.vectors.detach().double().numpy()
    final = sum(np.linalg.matrix_power(graph, layer) @ vectors for layer in range(4)) / 4
    np.testing.assert_allclose(rival.scores()(np.arange(3)), final[:3] @ final[40:].T, atol=1e-5)

    def loss() -> float:  # of all pairs of an item that a user has and one that the user has not
        scores = rival.scores()(np.arange(40)).numpy()
        margins = [row[has][:, None] - row[~has] for row, has in zip(scores, matrix > 0)]
        return float(np.mean([np.log1p(np.exp(-margin)).mean() for margin in margins]))

    before = loss()
    rival.adam.param_groups[0]["lr"] = 0.05  # for a small log
    for _ in range(30):
        rival.step()
    assert loss() < 0.5 * before


def test_the_published_form_goes_on_over_epochs() -> None:
    log = Interactions.of_matrix((np.random.default_rng(0).random((30, 20)) < 0.3).astype(np.float32))
    rival = retrieval.Published("movielens_1m", log, seed=1)
    assert rival.batches == 1
    first = rival.scores()(np.arange(30))
    for _ in range(3):  # three passes
        rival.step()
    changed = rival.scores()(np.arange(30))
    assert first.shape == (30, 20) and not torch.equal(first, changed)
