"""`ctrlib.joined`: what is done together trains as plain layers do, and stays out where somebody looks on.

That each tower's joined form gives the gradients of its plain one is a check of tests/conformance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctrlib as ctr
from ctrlib import joined
from ctrlib.embeddings.table import TableEmbedding
from ctrlib.joined import ScaledFields, by_onednn, linear
from ctrlib.layers import Dropout, Hidden, through
from ctrlib.models import build
from ctrlib.testing import example_batch, example_schema
from ctrlib.towers import CrossNetV2, GatedCrossNet
from ctrlib.towers.masknet import MaskBlock


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])  # the last is rounded to 65,535 of 65,536, and not to all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_after_relu_is_that_of_relu(dtype: torch.dtype, p: float) -> None:
    x = torch.randn(501, 333).to(dtype).requires_grad_()  # an odd number of elements
    direction = torch.randn(501, 333).to(dtype)

    def run(dropped: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        x.grad = None
        torch.manual_seed(0)
        y = dropped(x * 1)  # after_relu works in place
        y.backward(direction)
        return y.detach(), x.grad

    dropout = Dropout(p)
    for got, plain in zip(run(dropout.after_relu), run(lambda x: dropout(x.relu()))):
        assert got is not None and got.dtype == dtype and (got != 0).any()
        # In bfloat16 the plain form rounds 1 / (1 - p) before it multiplies.
        torch.testing.assert_close(got, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("hooked", [0, 1, 2, 3, 4, 5])
def test_layers_that_somebody_watches_are_called(hooked: int) -> None:
    hidden = Hidden(5, (6, 4), batch_norm=True, dropout=0.5)
    x = torch.randn(40, 5)
    torch.manual_seed(0)
    expected = hidden(x)
    seen: list[torch.Tensor] = []
    hidden[hooked].register_forward_hook(lambda _, given, out: seen.append(out.clone()))
    torch.manual_seed(0)
    torch.testing.assert_close(hidden(x), expected)
    assert len(seen) == 1
    plain = x
    torch.manual_seed(0)
    for layer in list(hidden)[: hooked + 1]:
        plain = layer(plain)
    torch.testing.assert_close(seen[0], plain)


@pytest.mark.parametrize("numbers", ["first", "last", "between"])
@pytest.mark.parametrize("name", ["deepfm", "fm", "mlp", "dcnv2", "gdcn", "xdeepfm", "autoint_plus"])
def test_numbers_that_are_not_written_out_train_alike(name: str, numbers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients are those of x_f v_f written out, and nothing else is taken where somebody looks on."""
    schema = example_schema()
    if numbers != "between":
        order = sorted(schema.features, key=lambda one: isinstance(one, ctr.Numeric) != (numbers == "first"))
        schema = replace(schema, features=tuple(order))
    batch = example_batch(schema, 200)
    arguments = {"head_dim": 4} if name == "autoint_plus" else {}
    model = build({"model": name, "embedding_dim": 8, **arguments}, schema)
    taken: list[bool] = []
    model.tower.register_forward_pre_hook(lambda _, given: taken.append(isinstance(given[0], ScaledFields)))

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits = model(batch)
        torch.autograd.backward((logits * torch.linspace(-1, 1, 200).unsqueeze(1)).sum())
        return {"": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    plain = run()  # the hook keeps it so
    assert taken == [False]
    model.tower._forward_pre_hooks.clear()
    monkeypatch.setattr(TableEmbedding, "forward", lambda *_: pytest.fail("written out"))
    if numbers == "between":
        with pytest.raises(pytest.fail.Exception):
            run()
        return
    for got, expected in zip(run().items(), plain.items(), strict=True):
        assert got[0] == expected[0]
        assert (got[1] - expected[1]).norm() <= 1e-5 * expected[1].norm() + 1e-7, got[0]
    with pytest.raises(pytest.fail.Exception), torch.no_grad():
        model.eval()(batch)


def test_a_first_layer_of_another_kind_reads_numbers_written_out() -> None:
    schema = replace(example_schema(), features=example_schema().features[:2])
    model = build({"model": "mlp", "embedding_dim": 8, "hidden": (6,)}, schema)
    batch = example_batch(schema, 50)
    linear = model.tower.layers[0]
    expected = model.eval()(batch).detach()
    model.tower.layers[0] = nn.Sequential(linear)
    torch.testing.assert_close(model.train()(batch), expected)
    model.tower.layers[0] = linear
    linear.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(batch), expected)


class Clamped(ctr.MLP):
    """A user's own tower, which inherits what it knows nothing of."""

    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x.clamp(-0.1, 0.1))


class Doubled(ctr.TableEmbedding):
    """A user's own embedding."""

    def forward(self, batch: ctr.Batch) -> torch.Tensor:
        return 2 * super().forward(batch)


class Halved(ctr.Parallel):
    """A user's own tower of towers."""

    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize("part", ["tower", "tower inside", "embedding", "parallel", "layers", "forward", "double"])
def test_parts_of_ones_own_train_as_they_score(part: str) -> None:
    torch.manual_seed(0)
    schema = replace(example_schema(), features=example_schema().features[:2])
    embedding = (Doubled if part == "embedding" else ctr.TableEmbedding)(schema.features, embedding_dim=4)
    shape = embedding.out_shape
    mlp = (Clamped if part.startswith("tower") else ctr.MLP)(shape, hidden=(6,))
    tower = mlp if part == "tower" else (Halved if part == "parallel" else ctr.Parallel)(mlp, ctr.FM(shape))
    model = ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))
    for weight in model.parameters():
        weight.data.normal_()
    if part == "layers":
        mlp.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    if part == "forward":
        mlp.layers[0].forward = lambda x: x[:, :6]
    if part == "double":
        model = model.double()
    batch = example_batch(schema, 30)
    scores = model.eval()(batch)
    torch.testing.assert_close(model.train()(batch), scores)


def test_frozen_tables_get_no_gradient_and_others_theirs() -> None:
    features = example_schema().features
    schema = replace(example_schema(), features=(features[0], features[2], features[1]))  # user, item, price
    model, batch = build({"model": "deepfm", "embedding_dim": 4}, schema), example_batch(schema, 40)
    torch.autograd.backward(model(batch).sum())
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    frozen = [name for name in expected if "user" in name]
    assert len(frozen) == 2
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    torch.autograd.backward(model(batch).sum())
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (name in frozen)
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected[name])
    # Nor is room made for one: gradients of all tables lie behind each other.
    items = model.get_parameter("embedding.tables.embedding_bags.table_item.weight")
    assert items.grad is not None and items.grad.untyped_storage().nbytes() == 4 * items.numel()


def test_training_goes_through_what_looks_into_it() -> None:
    """Derivatives of derivatives, torch.func, torch.compile, checkpoints: the joined forms work there or stay out."""
    schema = replace(example_schema(), features=example_schema().features[:2])
    model = build({"model": "wide_deep", "embedding_dim": 4, "hidden": (6,), "dropout": 0.5}, schema)
    batch = example_batch(schema, 20)
    (gradient,) = torch.autograd.grad(model(batch).square().sum(), model.embedding.numeric.vectors, create_graph=True)
    torch.autograd.backward(gradient.square().sum())
    assert model.tower.layers[0].weight.grad is not None
    tower, x = model.tower, torch.randn(20, 2, 4)
    weights = dict(tower.named_parameters())
    by_func = torch.func.grad(lambda given: torch.func.functional_call(tower.eval(), given, (x,)).sum())(weights)
    tower.train()
    for layer in tower.layers:
        layer.train(not isinstance(layer, Dropout))  # dropout alone in evaluation: no noise, whoever asks
    torch.testing.assert_close(tower(x), tower(x))
    compiled = torch.compile(tower, backend="aot_eager")
    for run in (tower, compiled, lambda x: checkpoint(tower, x, use_reentrant=False)):
        tower.zero_grad()
        torch.autograd.backward(run(x).sum())
        for name, weight in tower.named_parameters():
            torch.testing.assert_close(weight.grad, by_func[name])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile itself looks
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_compiled_network_with_dropout_has_the_gradients_of_one_that_is_not(batch_norm: bool) -> None:
    hidden = Hidden(6, (8, 4), batch_norm=batch_norm, dropout=0.5)
    rows, found = torch.randn(30, 6), []
    for network in (hidden, torch.compile(hidden, backend="aot_eager")):
        x = rows.clone().requires_grad_()
        hidden.zero_grad()
        torch.manual_seed(0)
        torch.autograd.backward(network(x).square().sum())
        found.append([x.grad, *(weight.grad for weight in hidden.parameters())])
    for eager, compiled in zip(*found):
        assert eager is not None and eager.any()
        # A bias before batch normalisation has a gradient of 0, and what sums leave of it.
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_what_a_hook_was_given_stays_as_it_was() -> None:
    """Where the ReLU behind it is not in place."""
    block = MaskBlock(6, 5, 4, dropout=0.5)
    for training in (True, False):
        for layer in (block.mask[0], block.hidden[1]):
            seen: list[torch.Tensor] = []
            hook = layer.register_forward_hook(lambda _, given, out, seen=seen: seen.append(out))
            block.train(training)(torch.randn(50, 6), torch.randn(50, 5))
            hook.remove()
            assert seen[0].min() < 0


def test_a_relu_that_is_not_in_place_leaves_alone_what_it_reads() -> None:
    """As a gradient may need it."""
    x = torch.randn(20, 4, requires_grad=True)
    torch.autograd.backward(through([nn.Sigmoid(), nn.ReLU(), Dropout(0.5)], x).sum())
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("tower", [CrossNetV2, GatedCrossNet])
def test_backward_hooks_are_called(tower: Any) -> None:
    part = tower((3, 4))
    seen: list[str] = []
    for layer in part.modules():
        if isinstance(layer, nn.Linear):
            layer.register_full_backward_hook(lambda *_: seen.append("called"))
    torch.autograd.backward(part(torch.randn(20, 3, 4, requires_grad=True)).sum())
    assert len(seen) == sum(isinstance(layer, nn.Linear) for layer in part.modules())


def test_only_what_onednn_multiplies_is_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert by_onednn(x, layer) == joined.ENABLED
    for context in (torch.autocast("cpu", torch.float16), torch.no_grad()):
        with context:
            assert not by_onednn(x, layer)
            assert torch.equal(linear(layer, x), layer(x))
    torch._C._set_mkldnn_enabled(
        False
    )  # as `torch.backends.mkldnn.flags(enabled=False)`, which warns of something else
    try:
        assert not by_onednn(x, layer)
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(joined, "_multiplies_bfloat16", lambda: False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, layer)
    assert not by_onednn(x.double(), layer.double())
    assert not by_onednn(x, nn.Linear(3, 2).eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_swallowed(value: float) -> None:
    hidden, x = Hidden(3, (5, 4), dropout=0.5), torch.randn(6, 3)
    x[2, 1] = value
    assert not hidden(x)[2].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert not hidden(x)[2].isfinite().all()
