"""Both engines against plain re-implementations of what they claim to compute."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ctrlib as ctr
from ctrlib import models
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.average import BATCHES, renew_statistics
from ctrlib.training.guard import clip_gradients

SCHEMA = example_schema()


def inputs(embedding_dim: int = 8, **layout: Any) -> ctr.Inputs:
    return ctr.Inputs(SCHEMA, embedding_dim=embedding_dim, **layout)


MODELS: dict[str, Callable[..., ctr.Model]] = {
    "mlp": lambda **k: models.mlp(inputs(**k), hidden=(8,), batch_norm=True),
    "deepfm": lambda **k: models.deepfm(inputs(**k), hidden=(8,)),
    "dcnv2": lambda **k: models.dcnv2(inputs(**k), hidden=(8,), num_cross_layers=2),
    "fm": lambda **k: models.fm(inputs(**k)),
}

# A bias before batch normalisation has gradient 0 but for rounding, and Adam scales rounding up to a full step.
NOISE = {"tower.layers.0.bias", "tower.layers.1.running_mean"}


def test_loss_ignores_padding_and_missing_labels() -> None:
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.3], [7.0, 7.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, float("nan")], [0.0, 0.0]])
    loss = ctr.binary_cross_entropy(logits, labels, torch.tensor([1.0, 3.0, 0.0]))
    softplus = torch.nn.functional.softplus
    expected = (softplus(torch.tensor(-0.5)) + 3 * softplus(torch.tensor(2.0))) / 4 + softplus(torch.tensor(-1.0))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[2].tolist() == [0.0, 0.0]
    assert logits.grad[1, 1].item() == 0.0


def test_loss_without_any_label_is_zero_and_has_a_gradient_of_zero() -> None:
    logits = torch.zeros(2, 1, requires_grad=True)
    loss = ctr.binary_cross_entropy(logits, torch.full((2, 1), float("nan")), torch.ones(2))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().sum().item() == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_exact_engine_is_adam_on_bce_plus_l2_with_clipping(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    reference = copy.deepcopy(model)
    l2, network_l2, clip = 0.5, 0.2, 0.05  # all large enough to matter
    engine = ctr.ExactEngine(model, learning_rate=0.01, embedding_l2=l2, network_l2=network_l2, max_grad_norm=clip)
    adam = torch.optim.Adam(reference.parameters(), lr=0.01)
    tables = [p for n, p in reference.named_parameters() if n.startswith(("embedding.", "wide."))]
    others = [p for n, p in reference.named_parameters() if not n.startswith(("embedding.", "wide."))]
    for step in range(6):
        batch = example_batch(SCHEMA, 32, seed=step)
        engine.step(batch)
        adam.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(reference(batch), batch.labels)
        for factor, weights in ((l2, tables), (network_l2, others)):
            loss = loss + factor / 2 * sum(p.square().sum() for p in weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        adam.step()
    for (key, got), want in zip(model.state_dict().items(), reference.state_dict().values()):
        if key in NOISE:
            continue
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_the_model_holds_the_polynomial_average_of_the_weights_that_are_trained() -> None:
    """The same steps as without an average, and 10 / (t + 9) of the way to each of their weights."""
    torch.manual_seed(0)
    model = MODELS["mlp"]()
    last = ctr.ExactEngine(copy.deepcopy(model), learning_rate=0.01, embedding_l2=0.5)
    averaged = ctr.ExactEngine(model, learning_rate=0.01, embedding_l2=0.5, average_weights=True)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 7):
        batch = example_batch(SCHEMA, 32, seed=step)
        assert torch.equal(last.step(batch), averaged.step(batch))
        for name, parameter in last.model.named_parameters():
            now = parameter.detach().double()
            expected[name] = now if step == 1 else expected[name] + 10 / (step + 9) * (now - expected[name])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-7)
        trained = averaged.state()[f"trained.{name}"]
        assert torch.equal(trained, last.model.get_parameter(name))
    # Buffers, such as running statistics, are those of training.
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), last.model.buffers(), strict=True))


def test_statistics_are_those_of_the_weights_that_are_scored() -> None:
    """Mean over batches of each batch's mean and unbiased variance, whatever they were before; nothing else changes."""
    torch.manual_seed(0)
    engine = ctr.ExactEngine(MODELS["mlp"](), learning_rate=0.05, average_weights=True)
    batches = [example_batch(SCHEMA, 32, seed=seed) for seed in range(3)]
    for batch in batches:
        engine.step(batch)
    model = engine.model
    before = engine.weights()
    model.train()
    renew_statistics(model, batches)
    linear, norm = model.tower.layers[0], model.tower.layers[1]
    with torch.no_grad():
        hidden = [linear(model.embedding(batch).flatten(1)) for batch in batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert norm.momentum == 0.1 and all(part.training for part in model.modules())
    after = engine.weights()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"tower.layers.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_no_more_batches_are_taken_than_statistics_need() -> None:
    taken = []

    def endless() -> Iterator[ctr.Batch]:
        while True:
            taken.append(1)
            yield example_batch(SCHEMA, 8)

    renew_statistics(MODELS["mlp"](), endless())
    assert len(taken) == BATCHES
    renew_statistics(MODELS["fm"](), endless())  # has none
    assert len(taken) == BATCHES


def test_other_weights_start_their_average_anew() -> None:
    engine = ctr.ExactEngine(MODELS["fm"](), learning_rate=0.01, average_weights=True)
    start = engine.weights()
    first = engine.step(example_batch(SCHEMA, 16))
    engine.step(example_batch(SCHEMA, 16, seed=1))
    engine.load_weights(start)
    assert torch.equal(engine.step(example_batch(SCHEMA, 16)), first)  # the trained weights are those given, too
    assert all(torch.equal(p, engine.state()[f"trained.{name}"]) for name, p in engine.model.named_parameters())


def test_exact_engine_decays_rows_that_no_batch_touches() -> None:
    model = MODELS["mlp"]()
    table = model.embedding.tables.embedding_bags["table_user"].weight
    row = table[1].detach().abs().sum().item()  # id 1 (missing) never occurs in example batches
    engine = ctr.ExactEngine(model, embedding_l2=0.1, learning_rate=1e-5)
    for step in range(3):
        engine.step(example_batch(SCHEMA, 16, seed=step))
    assert table[1].detach().abs().sum().item() < row
    assert table[0].abs().sum().item() == 0.0  # the padding row stays zero


def reference_fused(model: ctr.Model, batches: list[ctr.Batch], *, lr: float, table_lr: float) -> None:
    """Row-wise Adagrad on tables (a wide table counted as one column), Adam on the rest, in plain torch."""
    tables = {n: p for n, p in model.named_parameters() if ".embedding_bags." in n}
    rest = [p for n, p in model.named_parameters() if n not in tables]
    adam = torch.optim.Adam(rest, lr=lr)
    sums = {n: torch.zeros(p.shape[0]) for n, p in tables.items()}
    for batch in batches:
        model.zero_grad()
        ctr.binary_cross_entropy(model(batch), batch.labels, batch.weights).backward()
        torch.nn.utils.clip_grad_norm_(rest, 10.0)
        adam.step()
        with torch.no_grad():
            for name, parameter in tables.items():
                assert parameter.grad is not None
                sums[name] += parameter.grad.square().mean(1)
                step = table_lr * parameter.grad / (sums[name].sqrt() + 1e-8)[:, None]
                parameter -= torch.where(parameter.grad.abs().sum(1, keepdim=True) > 0, step, 0.0)


@pytest.mark.parametrize("stacked", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_fused_engine_is_row_wise_adagrad_and_adam(name: str, stacked: int) -> None:
    torch.manual_seed(0)
    wide = {"wide_columns": 4} if name in ("fm", "deepfm") else {}
    model = MODELS[name](**wide, stacked=stacked)
    # At 0 a row's click and no click cancel: what is left is rounding, and Adagrad makes a whole step of it.
    torch.nn.init.constant_(model.get_parameter("head.bias"), 1.0)
    reference = MODELS[name](stacked=stacked)  # one wide column: four equal ones must move like it
    state = {
        key: value[:, :1] if "_wide" in key and value.shape[1] == 4 else value
        for key, value in model.state_dict().items()
    }
    reference.load_state_dict(copy.deepcopy(state))
    engine = ctr.FusedEngine(model, learning_rate=0.01, embedding_learning_rate=0.05)
    batches = [example_batch(SCHEMA, 32, seed=step) for step in range(6)]
    for batch in batches:
        engine.step(batch)
    reference_fused(reference, batches, lr=0.01, table_lr=0.05)
    got = engine.weights()
    for key, want in reference.state_dict().items():
        if key in NOISE:
            continue
        found = got[key]
        if "_wide" in key:
            assert torch.equal(found, found[:, :1].expand_as(found)), "the four columns drifted apart"
            found = found[:, :1]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_fused_engine_keeps_the_weights_of_the_model_it_is_given() -> None:
    model = MODELS["mlp"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = ctr.FusedEngine(model).weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("engine_class", [ctr.ExactEngine, ctr.FusedEngine])
def test_cutting_the_learning_rate_to_zero_freezes_everything(engine_class: type) -> None:
    engine = engine_class(MODELS["mlp"](), max_grad_norm=None)
    engine.step(example_batch(SCHEMA, 16))
    engine.learning_rates = [0.0 for _ in engine.learning_rates]
    before = engine.weights()
    engine.step(example_batch(SCHEMA, 16, seed=1))
    after = engine.weights()
    learned = [name for name in before if "running_" not in name and "num_batches" not in name]
    assert set(engine.learning_rates) == {0.0}
    assert all(torch.equal(before[name], after[name]) for name in learned)


AVERAGING = functools.partial(ctr.ExactEngine, average_weights=True)


@pytest.mark.parametrize("engine_class", [ctr.ExactEngine, ctr.FusedEngine, AVERAGING])
def test_a_non_finite_loss_changes_no_weight(engine_class: Callable[..., Any]) -> None:
    engine = engine_class(MODELS["mlp"]())
    engine.model.train()
    before = engine.weights()
    batch = example_batch(SCHEMA, 16)
    batch.dense[3, 0] = float("inf")
    assert not torch.isfinite(engine.step(batch))
    after = engine.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)  # running statistics too


def test_frozen_tables_stay_frozen_with_l2_and_after_a_cut() -> None:
    model = MODELS["mlp"]()
    for parameter in model.embedding.parameters():
        parameter.requires_grad_(False)
    engine = ctr.ExactEngine(model, embedding_l2=0.1)
    before = engine.weights()
    engine.step(example_batch(SCHEMA, 16))
    fused = ctr.FusedEngine(MODELS["mlp"](), embedding_learning_rate=0.0)
    kept = fused.weights()
    fused.learning_rates = [rate * 0.1 for rate in fused.learning_rates]
    fused.step(example_batch(SCHEMA, 16))
    for start, end in ((before, engine.weights()), (kept, fused.weights())):
        assert all(torch.equal(start[name], end[name]) for name in start if ".embedding_bags." in name)


def test_a_loss_of_ones_own() -> None:
    def squared(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ((logits - labels).square() * weights[:, None]).mean()

    batch = example_batch(SCHEMA, 16)
    model = MODELS["fm"]()
    expected = squared(model(batch), batch.labels, batch.weights)
    torch.testing.assert_close(ctr.ExactEngine(model, loss=squared).step(batch), expected.detach())


@pytest.mark.parametrize("engine_class", [ctr.ExactEngine, ctr.FusedEngine, AVERAGING])
def test_weights_round_trip_and_refuse_other_keys(engine_class: Callable[..., Any]) -> None:
    engine = engine_class(MODELS["deepfm"](wide_columns=4))
    kept = engine.weights()
    engine.step(example_batch(SCHEMA, 16))
    engine.load_weights(kept)
    again = engine.weights()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    kept.pop("head.bias")
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        engine.load_weights(kept)


def test_fused_engine_refuses_widths_its_kernels_cannot_do() -> None:
    with pytest.raises(ValueError, match="use embedding_dim=12"):
        ctr.FusedEngine(models.mlp(inputs(embedding_dim=10), hidden=(4,)))
    with pytest.raises(ValueError, match="columns=4"):
        ctr.FusedEngine(models.fm(inputs()))


@pytest.mark.parametrize("engine", [ctr.ExactEngine, ctr.FusedEngine])
def test_bf16_stays_close_to_fp32(engine: Any) -> None:
    torch.manual_seed(0)
    model = MODELS["dcnv2"]()
    low = engine(copy.deepcopy(model), precision="bf16")
    high = engine(model)
    # Two cross and two hidden layers' products, 15 roundings at most of 2^-9.4 each on the way of a logit of size 1,
    # are 2^-7.4. A logit's derivative is about 1/2, and the mean is over 64 rows: 2^-11.4. Four times that is for the
    # weights of later steps. Over 20 seeds it comes to 0.27 of this.
    for step in range(20):
        batch = example_batch(SCHEMA, 64, seed=step)
        low_loss, high_loss = low.step(batch), high.step(batch)
        assert low_loss.dtype == torch.float32
        torch.testing.assert_close(low_loss, high_loss, rtol=0, atol=2**-9.4)
        assert not torch.equal(low_loss, high_loss)


def test_both_engines_learn_the_same_problem() -> None:
    for engine_class in (ctr.ExactEngine, ctr.FusedEngine):
        torch.manual_seed(0)
        engine = engine_class(MODELS["mlp"](), learning_rate=0.01)
        batch = example_batch(SCHEMA, 64)
        first = engine.step(batch).item()
        for _ in range(40):
            last = engine.step(batch).item()
        assert last < 0.5 * first, engine_class


def test_gradients_are_clipped_together_and_only_if_too_long() -> None:
    torch.manual_seed(0)
    parameters = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    for norm in (0.5, 2.0):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        total = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad *= norm / total
        before = [p.grad.clone() for p in parameters if p.grad is not None]
        clip_gradients(parameters, max_norm=1.0)
        for parameter, gradient in zip(parameters, before, strict=True):
            assert parameter.grad is not None
            if norm < 1:
                assert torch.equal(parameter.grad, gradient)
            else:
                torch.testing.assert_close(parameter.grad, gradient / 2, rtol=1e-5, atol=1e-6)


def test_auxiliary_losses_are_minimised_with_the_weights_of_their_rows_and_not_reported() -> None:
    class Strict(ctr.LinearHead):
        """Adds a loss of its own in training: 3 for even rows, 5 for odd ones, and 0.25 for the batch."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            if self.training:
                rows = torch.arange(len(x)) % 2 * 2.0 + 3.0
                ctr.losses.add_auxiliary(rows + 0 * logits[:, 0])
                ctr.losses.add_auxiliary(torch.tensor(0.25))
            return logits

    batch = example_batch(SCHEMA, 4)
    batch.weights = torch.tensor([1.0, 3.0, 0.0, 0.0])
    for engine_class in (ctr.ExactEngine, ctr.FusedEngine):
        losses = []
        for head in (ctr.LinearHead, Strict):
            torch.manual_seed(0)
            embedding = ctr.TableEmbedding(SCHEMA.features, embedding_dim=4)
            tower = ctr.MLP(embedding.out_shape, hidden=(4,))
            losses.append(engine_class(ctr.Model(embedding, tower, head(tower.out_shape))).step(batch).item())
        assert losses[0] == losses[1]
    with ctr.losses.collect_auxiliary() as auxiliary:
        Strict((3,)).train()(torch.zeros(4, 3))
    total = ctr.losses.total_auxiliary(auxiliary, batch.weights)
    assert total.item() == pytest.approx((1 * 3 + 3 * 5) / 4 + 0.25)
    Strict((3,))(torch.zeros(4, 3))  # nobody collects: nothing happens


@pytest.mark.parametrize("engine_class", [ctr.ExactEngine, ctr.FusedEngine])
def test_auxiliary_losses_move_the_weights(engine_class: type[ctr.ExactEngine] | type[ctr.FusedEngine]) -> None:
    class Shrinking(ctr.MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            ctr.losses.add_auxiliary(1e3 * out.square().mean(1))
            return out

    sizes = []
    for make in (ctr.MLP, Shrinking):
        torch.manual_seed(0)
        embedding = ctr.TableEmbedding(SCHEMA.features, embedding_dim=4, init_std=1.0)
        tower = make(embedding.out_shape, hidden=(4,))
        engine = engine_class(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape)), learning_rate=0.05)
        batch = example_batch(SCHEMA, 32)
        for _ in range(50):
            engine.step(batch)
        with torch.no_grad():
            sizes.append(tower(embedding(batch)).square().mean().item())
    assert sizes[1] < 0.01 * sizes[0]


def test_fused_engine_says_when_an_id_is_out_of_range() -> None:
    batch = example_batch(SCHEMA, 8)
    batch.sparse.values()[0] = 10_000
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        ctr.FusedEngine(MODELS["mlp"]()).step(batch)


def test_kept_memory_is_not_faulted_in_again() -> None:
    script = """
import resource, torch
from ctrlib.training.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)  # 16 MB, 3,900 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
default = faults()
print(keep_freed_memory())
faults()
print(default, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, counts = done.stdout.splitlines()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    default, after = map(int, counts.split())
    assert after < default / 20 or default < 1000  # the latter where an allocator keeps memory by itself
