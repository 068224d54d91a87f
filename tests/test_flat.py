"""Networks as flat functions, for scoring: the same bits, never out of date, and the modules left as they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ctrlib as ctr
from ctrlib import models
from ctrlib.data.collate import collate
from ctrlib.data.columns import Columns
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.layers import Dropout, Hidden
from ctrlib.models import MODELS
from ctrlib.schema import Categorical, Numeric, Schema
from ctrlib.serving.direct import Rows, direct
from ctrlib.serving.flat import flat
from ctrlib.testing import example_schema

# The first goes through its rows in blocks, whose number it must know.
AS_THEY_ARE = {"xdeepfm", "apem"}


@pytest.mark.parametrize("name", MODELS)
def test_every_network_gives_the_same_bits(name: str) -> None:
    config = {"model": name, "embedding_dim": 8, **({"head_dim": 4} if name.startswith("autoint") else {})}
    torch.manual_seed(0)
    model = models.build(config, example_schema(num_tasks=2)).eval()
    network = nn.Sequential(model.tower, model.head).eval()
    before = {key: id(tensor) for key, tensor in network.state_dict(keep_vars=True).items()}
    function = flat(network)
    assert {key: id(tensor) for key, tensor in network.state_dict(keep_vars=True).items()} == before
    assert (function is None) == (name in AS_THEY_ARE)
    *streams, fields, dim = model.tower.in_shape
    with torch.no_grad():
        for rows in (1, 7):
            x = torch.randn(*streams, rows, fields, dim)
            expected = network(x.clone())
            assert expected.shape == (rows, 2)
            if function is not None:
                assert torch.equal(function(x.clone()), expected)
        for parameter in network.parameters():  # what trains on is read anew
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if function is not None:
            assert not torch.equal(network(x.clone()), expected)
            assert torch.equal(function(x.clone()), network(x.clone()))


@pytest.mark.parametrize("rows", [1, 5])
def test_normalisation_and_dropout_are_those_of_evaluation(rows: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Hidden(6, (5, 4), batch_norm=True, dropout=0.5))
    network(torch.randn(20, 6))  # running statistics other than 0 and 1
    network.eval()
    function, x = flat(network), torch.randn(rows, 6)
    assert function is not None
    assert torch.equal(function(x), network(x))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):  # its own check is back
        network(torch.randn(6))


class Counting(nn.Module):
    """One of somebody else's: what it does besides its operations must be done at every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Deciding(nn.Linear):
    """Decides by the values of tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


Deciding.__module__ = "ctrlib.deciding"  # as if it were ours


@pytest.mark.parametrize(
    "network",
    [
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3).eval(), Dropout(0.5)),
        nn.Sequential(nn.Linear(3, 3), Counting()).eval(),
        nn.Sequential(nn.Linear(3, 3), Deciding(3, 3)).eval(),
    ],
    ids=["in training", "a part in training", "another's", "by values"],
)
def test_what_cannot_be_recorded_stays(network: nn.Module) -> None:
    weights = list(network.parameters())
    assert flat(network) is None
    assert all(isinstance(weight, nn.Parameter) for weight in weights)
    assert all(mine is theirs for mine, theirs in zip(network.parameters(), weights, strict=True))
    network.eval()
    assert network(torch.ones(2, 3)).shape == (2, 3)


def test_hooks_are_called_at_every_call() -> None:
    network, seen = nn.Sequential(nn.Linear(3, 3)).eval(), []
    network[0].register_forward_hook(lambda part, given, made: seen.append(made))
    assert flat(network) is None
    network(torch.ones(2, 3))
    assert len(seen) == 1


def test_under_autocast_a_model_scores_as_it_does_itself() -> None:
    schema = Schema((Categorical("a", num_embeddings=9), Numeric("n", parameters={"fill": 0.0})), ("y",))
    torch.manual_seed(0)
    model = models.build({"model": "dcnv2", "embedding_dim": 8, "hidden": [16]}, schema).eval()
    columns = Columns(np.array([[3], [4], [8]], np.int32), {}, np.array([[0.3, 0], [2, 0], [-1, 0]], np.float32), None)
    quick = direct(model, schema)
    with torch.no_grad():
        expected = model(collate(columns, schema, 3))
        assert torch.equal(quick(Rows(columns, schema)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(collate(columns, schema, 3))
            assert torch.equal(quick(Rows(columns, schema)), narrow)
        assert not torch.equal(narrow, expected)
        assert torch.equal(quick(Rows(columns, schema)), expected)


def test_threads_share_a_predictor_from_its_first_call_on(tmp_path: Path) -> None:
    frame, _ = generate(Teacher(400, cardinalities=(40, 9), num_numeric=1, seed=3))
    schema = ctr.prepare(frame, tmp_path / "p", labels="label", log=None)
    model = models.build({"model": "dcnv2", "embedding_dim": 4, "hidden": [8]}, schema).eval()
    rows = frame.drop("label").to_dicts()[:200]
    alone = ctr.Predictor(model, schema, tmp_path / "p")
    expected = [alone.predict(row)[0]["label"][0] for row in rows]
    assert len(set(expected)) > 100
    shared = ctr.Predictor(model, schema, tmp_path / "p")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: shared.predict(row)[0]["label"][0], rows)) == expected


def test_a_predictor_follows_a_model_that_trains_on(tmp_path: Path) -> None:
    frame, _ = generate(Teacher(400, cardinalities=(40, 9), num_numeric=1, seed=3))
    schema = ctr.prepare({"train": frame}, tmp_path / "p", labels="label", log=None)
    model = models.build({"model": "deepfm", "embedding_dim": 4, "hidden": [8]}, schema).eval()
    predictor = ctr.Predictor(model, schema, tmp_path / "p")
    before = predictor.predict(frame)[0]
    assert not any(parameter.is_inference() for parameter in model.parameters())
    engine = ctr.ExactEngine(model.train(), learning_rate=0.1)
    for batch in ctr.Loader(tmp_path / "p", "train", batch_size=100):
        engine.step(batch)
    after = predictor.predict(frame)[0]
    assert (after["label"] - before["label"]).abs().max() > 0.1
    assert after.equals(ctr.Predictor(model.eval(), schema, tmp_path / "p").predict(frame)[0])
