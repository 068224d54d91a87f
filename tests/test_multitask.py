"""Heads of several labels: equalities that hold exactly, equations written out, closed forms, the public contract."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import conforms
from ranks import run_ranks
from test_sharding import part
from torch import Tensor, nn

import ctrlib as ctr
from ctrlib import models, plots
from ctrlib.analysis.transfer import _Ranked
from ctrlib.data.synthetic import conflict
from ctrlib.heads.aitm import order_violation
from ctrlib.heads.esmm import logit_of_both
from ctrlib.heads.stacked import StackedHidden, StackedLinear
from ctrlib.heads.stem import STEM
from ctrlib.losses import collect_auxiliary, total_auxiliary
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.evaluate import Scores, score
from harness import LabelKnobs, run_label_recipe

B, H, T = 7, 6, 3
NARROW: dict[str, Any] = {"expert_hidden": (8, 5), "tower_hidden": (4,)}

# All that take one stream of (B, H).
HEADS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "task_towers": lambda s: ctr.heads.TaskTowers(s, num_tasks=T, hidden=(4,)),
    "shared_bottom": lambda s: ctr.heads.SharedBottom(s, num_tasks=T, bottom_hidden=(8, 5), tower_hidden=(4,)),
    "mmoe": lambda s: ctr.heads.MMoE(s, num_tasks=T, num_experts=4, **NARROW),
    "omoe": lambda s: ctr.heads.MMoE(s, num_tasks=T, num_experts=4, one_gate=True, **NARROW),
    "cgc": lambda s: ctr.heads.PLE(s, num_tasks=T, num_own=2, num_shared=1, **NARROW),
    "ple": lambda s: ctr.heads.PLE(s, num_tasks=T, num_levels=2, num_own=1, num_shared=2, **NARROW),
    "esmm": lambda s: ctr.heads.ESMM(s, num_tasks=T, hidden=(4,)),
    "aitm": lambda s: ctr.heads.AITM(s, num_tasks=T, tower_hidden=(8, 4)),
}


test_variants = conforms({name: HEADS[name] for name in ("omoe", "ple")}, (H,), head=True)


@pytest.mark.parametrize("name", ["mmoe", "omoe", "cgc", "ple", "stem"])
def test_gates_are_float32_under_autocast(name: str) -> None:
    """In bfloat16 their sums would be off by up to 2^-8 for every expert."""
    torch.manual_seed(0)
    in_shape = (H,) if name in HEADS else (T + 1, H)
    head = HEADS[name](in_shape) if name in HEADS else STEM(in_shape, num_tasks=T, num_experts=2, **NARROW)
    with torch.autocast("cpu", torch.bfloat16):
        gates = head.gate_weights(torch.randn(*in_shape[:-1], 50, H))
    torch.testing.assert_close(gates.sum(2), torch.ones(T, 50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*HEADS, "stem"])
def test_streams_do_what_a_pass_for_each_task_does(name: str) -> None:
    """Task t's logit of (S, B, H) is that of the same weights on stream t alone (with the shared one, if there is)."""
    torch.manual_seed(0)
    num_streams = T + (name in ("cgc", "ple", "stem"))
    make = {**HEADS, "stem": lambda s: ctr.heads.STEM(s, num_tasks=T, num_experts=2, **NARROW)}[name]
    head = make((num_streams, H))
    x = torch.randn(num_streams, B, H)
    out = head(x)
    for task in range(T):
        # Other streams hold something else: only heads that hand on across tasks may see it.
        other = torch.randn_like(x)
        other[[task, -1]] = x[[task, -1]]
        same = torch.equal(head(other)[:, task], out[:, task])
        assert same != (name in ("stem", "ple") or (name in ("esmm", "aitm") and task > 0)), task
    if name != "stem":
        plain = make((H,))
        plain.load_state_dict(head.state_dict())
        torch.testing.assert_close(head(x[:1].expand_as(x)), plain(x[0]))


def grads(loss: Tensor, parameters: Any) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def test_stacked_layers_are_layers_side_by_side() -> None:
    stacked, of_one = (StackedHidden(3, H, (8, 5), one_input=one_input) for one_input in (False, True))
    singles = [nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()) for _ in range(3)]
    for n, single in enumerate(singles):
        for layer, linear in ((stacked[0], single[0]), (stacked[2], single[2])):
            assert isinstance(layer, StackedLinear) and layer.bias is not None
            nn.init.normal_(layer.bias[n])
            linear.load_state_dict({"weight": layer.weight[n], "bias": layer.bias[n, 0]})
    of_one.load_state_dict(stacked.state_dict())
    x = torch.randn(3, B, H)
    torch.testing.assert_close(stacked(x), torch.stack([single(x[n]) for n, single in enumerate(singles)]))
    torch.testing.assert_close(of_one(x[0]), torch.stack([single(x[0]) for single in singles]))


def test_mmoe_with_one_expert_is_shared_bottom() -> None:
    mmoe = ctr.heads.MMoE((H,), num_tasks=T, num_experts=1, **NARROW)
    plain = HEADS["shared_bottom"]((H,))
    with torch.no_grad():
        for mine, theirs in zip(list(plain.bottom)[::2], list(mmoe.experts)[::2]):
            nn.init.normal_(theirs.bias)
            mine.weight.copy_(theirs.weight[0])
            mine.bias.copy_(theirs.bias[0, 0])
    plain.towers.load_state_dict(mmoe.towers.state_dict())
    x = torch.randn(B, H)
    torch.testing.assert_close(mmoe(x), plain(x), rtol=0, atol=1e-6)


def test_gates_do_not_matter_where_experts_are_alike() -> None:
    mmoe = ctr.heads.MMoE((H,), num_tasks=T, num_experts=4, **NARROW)
    with torch.no_grad():
        for layer in list(mmoe.experts)[::2]:
            layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
    x = torch.randn(B, H)
    before = mmoe(x)
    gates = mmoe.gate_weights(x)
    nn.init.normal_(mmoe.gate.weight)
    assert (mmoe.gate_weights(x) - gates).abs().max() > 0.1
    torch.testing.assert_close(mmoe(x), before, rtol=0, atol=1e-6)


def test_mmoe_with_one_hot_gates_is_a_net_for_each_task() -> None:
    mmoe = ctr.heads.MMoE((H,), num_tasks=T, num_experts=T, **NARROW)
    x = torch.randn(B, H)
    x[:, 0] = 1.0
    with torch.no_grad():
        mmoe.gate.weight.zero_()
        mmoe.gate.weight[:, :, 0] = 1e4 * torch.eye(T)
    alone = mmoe.towers(mmoe.experts(x))
    assert torch.equal(mmoe(x), alone)
    for task in range(T):
        for grad in grads(mmoe(x)[:, task].sum(), mmoe.experts.parameters()):
            others = [other for other in range(T) if other != task]
            assert grad[task].abs().sum() > 0
            assert torch.count_nonzero(grad[others]) == 0


def reference_ple(head: ctr.heads.PLE, x: Tensor, num_own: int, num_shared: int) -> Tensor:
    """The paper's equations, expert by expert: T task streams, then the shared one."""

    def expert(stack: nn.Module, index: int, value: Tensor) -> Tensor:
        for layer in stack:
            if isinstance(layer, StackedLinear):
                value = torch.relu(value @ layer.weight[index].T + layer.bias[index])
        return value

    streams = [x] * (T + 1)
    for level in head.levels:
        shared = [expert(level.shared, n, streams[-1]) for n in range(num_shared)]
        own = [[expert(level.own, t * num_own + n, streams[t]) for n in range(num_own)] for t in range(T)]
        new = []
        for t in range(T):
            weights = (streams[t] @ level.gates.weight[t].T).softmax(1)
            new.append(sum(weights[:, n : n + 1] * value for n, value in enumerate([*own[t], *shared])))
        if level.shared_gate is not None:
            everything = [value for task in own for value in task] + shared
            weights = (streams[-1] @ level.shared_gate.weight.T).softmax(1)
            new.append(sum(weights[:, n : n + 1] * value for n, value in enumerate(everything)))
        streams = new
    return head.towers(torch.stack(streams))


@pytest.mark.parametrize(("levels", "own", "shared"), [(1, 2, 1), (2, 1, 2), (3, 2, 2)])
def test_ple_follows_the_paper(levels: int, own: int, shared: int) -> None:
    head = ctr.heads.PLE((H,), num_tasks=T, num_levels=levels, num_own=own, num_shared=shared, **NARROW)
    x = torch.randn(B, H)
    torch.testing.assert_close(head(x), reference_ple(head, x, own, shared))
    # Nothing reads a shared stream after the last level: one level, CGC, has no gate of it at all.
    assert [level.shared_gate is not None for level in head.levels] == [True] * (levels - 1) + [False]
    torch.testing.assert_close(head.gate_weights(x).sum(2), torch.ones(T, B))


@pytest.mark.parametrize("levels", [1, 2])
def test_ple_without_shared_experts_shares_nothing(levels: int) -> None:
    head = ctr.heads.PLE((H,), num_tasks=T, num_levels=levels, num_own=2, num_shared=0, **NARROW)
    x = torch.randn(B, H)
    for task in range(T):
        others = [other for other in range(T) if other != task]
        for grad in grads(head(x)[:, task].sum(), head.parameters()):
            by_task = grad.unflatten(0, (T, -1))
            assert torch.count_nonzero(by_task[others]) == 0
        single = ctr.heads.PLE((H,), num_tasks=1, num_levels=levels, num_own=2, num_shared=0, **NARROW)
        single.load_state_dict({name: weight.unflatten(0, (T, -1))[task] for name, weight in head.state_dict().items()})
        torch.testing.assert_close(single(x)[:, 0], head(x)[:, task])


def test_ple_without_own_experts_is_mmoe() -> None:
    head = ctr.heads.PLE((H,), num_tasks=T, num_own=0, num_shared=4, **NARROW)
    mmoe = ctr.heads.MMoE((H,), num_tasks=T, num_experts=4, **NARROW)
    level = head.levels[0]
    mmoe.experts.load_state_dict(level.shared.state_dict())
    mmoe.gate.load_state_dict(level.gates.state_dict())
    mmoe.towers.load_state_dict(head.towers.state_dict())
    x = torch.randn(B, H)
    torch.testing.assert_close(head(x), mmoe(x))


def test_esmm_finds_the_rates_of_a_table() -> None:
    """One id with free logits for each value: the optimum is clicks / impressions and conversions / clicks."""
    shown = torch.tensor([400, 900, 250, 600])
    clicked = torch.tensor([120, 90, 200, 30])
    bought = torch.tensor([30, 45, 10, 3])
    head = ctr.heads.ESMM((4,), hidden=()).double()
    rows = torch.eye(4, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = head(rows)
        counts = torch.stack([clicked, bought], dim=1).double()
        # softplus(z) - y z, summed over the rows of each value
        loss = (shown.unsqueeze(1) * F.softplus(logits) - counts * logits).sum() / shown.sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    click, conversion = head.conditional_logits(rows).sigmoid().T
    torch.testing.assert_close(click, clicked / shown, rtol=0, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(conversion, bought / clicked, rtol=0, atol=1e-6, check_dtype=False)


def test_rows_without_a_click_teach_the_conversion_tower() -> None:
    head = ctr.heads.ESMM((H,), hidden=(4,))
    loss = ctr.binary_cross_entropy(head(torch.randn(B, H)), torch.zeros(B, 2), torch.ones(B))
    (grad,) = grads(loss, [head.towers.last.weight])
    assert grad[1].abs().sum() > 0


def test_chains_of_steps_are_exact_and_finite() -> None:
    a, b = torch.randn(2, 200, dtype=torch.float64) * 8
    p = a.sigmoid() * b.sigmoid()
    torch.testing.assert_close(logit_of_both(a, b), p.log() - torch.log1p(-p), rtol=1e-6, atol=1e-6)
    extremes = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
    a, b = (side.flatten().clone().requires_grad_() for side in torch.meshgrid(extremes, extremes, indexing="ij"))
    both = logit_of_both(a, b)
    for grad in grads(both.sum(), [a, b]):
        assert torch.isfinite(grad).all() and (grad >= 0).all()
    assert torch.isfinite(both).all()
    # A conjunction is never likelier than either, and where one step is certain it is the other.
    assert (both <= torch.minimum(a, b)).all()
    torch.testing.assert_close(logit_of_both(torch.tensor(3.0), torch.tensor(200.0)), torch.tensor(3.0))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
def test_later_steps_are_never_likelier(scale: float) -> None:
    head = ctr.heads.ESMM((H,), num_tasks=5, hidden=(4,))
    logits = head(scale * torch.randn(50, H))
    assert torch.isfinite(logits).all()
    assert (logits.diff(dim=1) <= 0).all()


def test_aitm_follows_the_paper() -> None:
    head = ctr.heads.AITM((H,), num_tasks=T, tower_hidden=(8, 4))
    x = torch.randn(B, H)
    own = head.bottoms(x)
    known = [own[0]]
    for transfer, q in zip(head.transfers, own[1:]):
        w_q, w_k, w_v = transfer.query_key_value.weight.chunk(3)
        slots = [transfer.handed_on(known[-1]), q]
        weights = torch.stack([((s @ w_q.T) * (s @ w_k.T)).sum(1) / 4**0.5 for s in slots]).softmax(0)
        known.append(sum(weight.unsqueeze(1) * (s @ w_v.T) for weight, s in zip(weights, slots)))
    torch.testing.assert_close(head(x), head.last(torch.stack(known)))


def test_aitm_calibrator() -> None:
    p = torch.tensor([[0.9, 0.5, 0.6], [0.9, 0.5, 0.1], [0.2, 0.2, 0.2]], requires_grad=True)
    violation = order_violation(p.logit())
    torch.testing.assert_close(violation, torch.tensor([0.1, 0.0, 0.0]))
    head = ctr.heads.AITM((H,), num_tasks=T, tower_hidden=(8, 4))
    x = torch.randn(B, H)
    for training, expected in ((True, 1), (False, 0)):
        head.train(training)
        with collect_auxiliary() as losses:
            logits = head(x)
        assert len(losses) == expected
        if losses:
            torch.testing.assert_close(losses[0], 0.6 * order_violation(logits))
    # In the probabilities: 0.6 / B up for the later step of a violating pair and as much down for the earlier one.
    with collect_auxiliary() as losses:
        losses.append(0.6 * violation)
    (grad,) = grads(total_auxiliary(losses, torch.ones(3)), [p])
    torch.testing.assert_close(grad, torch.tensor([[0.0, -0.2, 0.2], [0, 0, 0], [0, 0, 0]]))


def test_stem_reads_all_embeddings_and_teaches_its_own() -> None:
    torch.manual_seed(0)
    head = ctr.heads.STEM((T + 1, H), num_tasks=T, num_experts=2, **NARROW)
    x = torch.randn(T + 1, B, H, requires_grad=True)
    for task in range(T):
        (grad,) = grads(head(x)[:, task].sum(), [x])
        taught = {stream for stream in range(T + 1) if torch.count_nonzero(grad[stream])}
        assert taught == {task, T}
        for other in set(range(T)) - {task}:
            moved = x.detach().clone()
            moved[other] += 1
            assert (head(moved)[:, task] - head(x)[:, task]).abs().max() > 1e-4


def test_stem_streams_are_slices_of_one_table() -> None:
    schema = example_schema(2)
    model = models.stem(ctr.Inputs(schema, embedding_dim=4), **NARROW)
    assert model.embedding.out_shape == (6, 12)
    batch = example_batch(schema, 9)
    fields = model.embedding(batch)
    streams = model.tower(fields)
    for stream in range(3):
        assert torch.equal(streams[stream], fields[:, :, 4 * stream : 4 * stream + 4].flatten(1))


def test_loss_is_a_sum_over_tasks() -> None:
    logits, labels = torch.randn(B, 2), torch.randint(2, (B, 2)).float()
    labels[2, 0] = labels[4, 1] = torch.nan
    weights = torch.rand(B)
    alone = [ctr.binary_cross_entropy(logits[:, t : t + 1], labels[:, t : t + 1], weights) for t in range(2)]
    torch.testing.assert_close(ctr.binary_cross_entropy(logits, labels, weights), alone[0] + alone[1])
    weighted = ctr.binary_cross_entropy(logits, labels, weights, task_weights=(0.5, 3.0))
    torch.testing.assert_close(weighted, 0.5 * alone[0] + 3 * alone[1])
    with pytest.raises(ValueError, match="a weight for each of 2 tasks"):
        ctr.binary_cross_entropy(logits, labels, weights, task_weights=(1.0,))


def test_uncertainty_weighting_is_kendalls_at_the_best_scales() -> None:
    logits, labels, weights = torch.randn(B, 2), torch.randint(2, (B, 2)).float(), torch.rand(B)
    losses = [ctr.binary_cross_entropy(logits[:, t : t + 1], labels[:, t : t + 1], weights) for t in range(2)]

    def kendall(factor: float) -> Tensor:
        return sum(loss / s**2 + s.log() for loss in losses for s in [factor * (2 * loss).sqrt()])

    torch.testing.assert_close(ctr.losses.uncertainty_weighted(logits, labels, weights), kendall(1.0))
    assert all(kendall(factor) > kendall(1.0) for factor in (0.9, 1.1))


def test_clicked_only_labels() -> None:
    labels = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [torch.nan, torch.nan]])
    known = ~torch.isnan(ctr.losses.given_previous(labels))
    assert known.tolist() == [[True, True], [True, True], [True, False], [False, False]]


MODELS: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_hidden": (8, 5), "tower_hidden": (4,)},
    "mmoe": {"num_experts": 2, **NARROW, "refine": True},
    "ple": {**NARROW, "refine": True},
    "esmm": {"tower_hidden": (8,)},
    "aitm": {"tower_hidden": (8, 4)},
    "stem": NARROW,
    "apem": {"num_groups": 2, "tower_hidden": (4,)},
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_the_loss_of_one(name: str) -> None:
    schema = example_schema(2)

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = models.build({"model": name, "embedding_dim": 4, **MODELS[name]}, schema)
        engine = ctr.ExactEngine(model, learning_rate=0.01)
        engine.model.train()
        seen = []
        for seed in range(4):
            batch = example_batch(schema, 16, seed=seed)
            batch.weights[:] = torch.rand(16, generator=torch.Generator().manual_seed(seed))
            batch.labels[: 2 + seed, 1] = torch.nan  # on the first rank only
            seen.append(engine.step(part(batch)).item())
        return seen

    (alone,) = run_ranks(1, losses)
    assert alone[-1] < alone[0] + 1
    for together in run_ranks(2, losses):
        assert together == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ctr.heads.MMoE((H,), num_tasks=0), "needs one or more tasks"),
        (lambda: ctr.heads.MMoE((4, H), num_tasks=3), r"of \[3\] streams, got \(4, 6\)"),
        (lambda: ctr.heads.MMoE((H,), num_tasks=2, num_experts=0), "one or more networks"),
        (lambda: ctr.heads.PLE((2, H), num_tasks=2), r"of \[3\] streams"),
        (lambda: ctr.heads.PLE((H,), num_tasks=2, num_own=0, num_shared=0), "and experts"),
        (lambda: ctr.heads.PLE((H,), num_tasks=2, num_levels=0), "one or more levels"),
        (lambda: ctr.heads.STEM((H,), num_tasks=2), "needs 3 streams of embeddings"),
        (lambda: ctr.heads.AITM((H,), num_tasks=2, penalty=-1.0), "penalty must be 0 or more"),
        (lambda: ctr.heads.SharedBottom((H,), num_tasks=2, bottom_hidden=()), "hidden widths"),
        (lambda: ctr.towers.Streams((3, 8), num_streams=3), "a multiple of 3 as embedding_dim"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def scores(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> Scores:
    return Scores(logits.astype(np.float32), labels.astype(np.float32), np.ones(len(labels), np.float32), groups)


def test_ranked_auc_is_the_weighted_auc() -> None:
    rng = np.random.default_rng(0)
    labels, logits, weights = rng.random(500) < 0.3, rng.random(500).round(1), rng.integers(0, 4, 500).astype(float)
    expected = ctr.metrics.auc(labels, logits, weights)
    assert _Ranked.of(labels, logits).auc(weights) == pytest.approx(expected, abs=1e-12)


def test_a_planted_loss_is_reported_and_noise_is_not() -> None:
    """Task a: the model of all tasks adds noise to the true logit; task b: both add as much. DeLong's intervals."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 2))
    labels = rng.random((4000, 2)) < 1 / (1 + np.exp(-true))
    noisy = true + rng.normal(size=(2, 4000, 2)) * [1.0, 0.3]
    multi = scores(np.stack([noisy[0, :, 0], noisy[0, :, 1]], axis=1), labels)
    singles = [scores(true[:, :1], labels[:, :1]), scores(noisy[1, :, 1:], labels[:, 1:])]
    loses, same = ctr.analysis.compare_tasks(multi, singles, tasks=["a", "b"])
    assert (loses["verdict"], same["verdict"]) == ("loses", "no difference shown")
    for task, (found, single) in enumerate(zip((loses, same), singles)):
        test = ctr.metrics.auc_paired_test(labels[:, task], multi.logits[:, task], single.logits[:, 0])
        assert found["difference"] == pytest.approx(test.difference, abs=1e-9)
        low, high = found["interval"]
        assert (high - low) / (2 * 1.96) == pytest.approx(test.standard_error, rel=0.1)
    # Ten copies of each row in one group tell no more than one.
    groups = np.repeat(np.arange(400), 10)
    few = scores(multi.logits[groups], labels[groups], groups)
    alone = [scores(single.logits[groups], single.labels[groups], groups) for single in singles]
    clustered, plain = (
        ctr.analysis.compare_tasks(few if grouped else dataclasses.replace(few, groups=None), alone, tasks=["a", "b"])[
            0
        ]
        for grouped in (True, False)
    )
    ratio = np.diff(clustered["interval"]) / np.diff(plain["interval"])
    assert ratio[0] == pytest.approx(10**0.5, rel=0.2)


def test_scores_of_other_rows_are_refused() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, 2))
    multi, single = scores(rng.random((50, 2)), labels), scores(rng.random((50, 1)), labels[:, :1])
    for wrong in (single, multi):
        with pytest.raises(ValueError, match=r"[ab]: expected a model of this label alone, scored on the same rows"):
            ctr.analysis.compare_tasks(multi, [wrong, single], tasks=["a", "b"])
    with pytest.raises(ValueError, match="for each of 2 tasks"):
        ctr.analysis.compare_tasks(multi, [single], tasks=["a", "b"])
    one_class = scores(rng.random((50, 1)), np.ones((50, 1)))
    with pytest.raises(ValueError, match="one class only"):
        ctr.analysis.compare_tasks(one_class, [one_class], tasks=["a"])


def test_gradient_cosines_know_conflict_agreement_and_independence(tmp_path: Path) -> None:
    schema = example_schema(3)
    torch.manual_seed(0)
    model = models.shared_bottom(ctr.Inputs(schema, embedding_dim=4), bottom_hidden=(8,), tower_hidden=())
    with torch.no_grad():  # logits near 0; the second task weighs the bottom as the first, the third against it
        model.head.towers.last.weight *= 1e-2
        for copy in (1, 2):
            model.head.towers.last.weight[copy] = model.head.towers.last.weight[0] * (-1) ** (copy + 1)
    batch = example_batch(schema, 64)
    batch.labels[:] = batch.labels[:, :1]
    found = ctr.analysis.gradient_cosines(model, [batch, batch])
    for where in ("embedding", "network"):
        cosine, conflicts = (np.array(found[where][name]) for name in ("cosine", "conflicts"))
        np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)
        assert cosine[0, 1] == pytest.approx(1, abs=1e-5) and cosine[0, 2] < -0.99
        assert conflicts[0].tolist() == [0, 0, 1]
    independent = models.ple(
        ctr.Inputs(schema, embedding_dim=4), num_levels=1, num_shared=0, expert_hidden=(8,), tower_hidden=()
    )
    found = ctr.analysis.gradient_cosines(independent, [batch])
    assert np.isnan(np.array(found["network"]["cosine"])[~np.eye(3, dtype=bool)]).all()
    usage = ctr.analysis.gate_usage(independent, [batch])
    assert np.array(usage["head"]["mean"]).shape == (3, 2)
    both = ctr.predict(independent, [batch])
    alone = [dataclasses.replace(both, logits=both.logits[:, [t]], labels=both.labels[:, [t]]) for t in range(3)]
    tasks = ctr.analysis.compare_tasks(both, alone, tasks=schema.labels)
    assert [task["difference"] for task in tasks] == [0, 0, 0]
    plots.transfer({"tasks": tasks, "gradients": found, "gates": usage}, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


def test_gates_that_are_known() -> None:
    schema = example_schema(2)
    model = models.mmoe(ctr.Inputs(schema, embedding_dim=4), num_experts=4, refine=True)
    with torch.no_grad():
        model.head.gate.weight.zero_()
        model.tower.excite.zero_()
        model.tower.excite_bias[1] = 200.0
    usage = ctr.analysis.gate_usage(model, [example_batch(schema, 5), example_batch(schema, 3)])
    np.testing.assert_allclose(usage["head"]["mean"], np.full((2, 4), 0.25), atol=1e-6)
    np.testing.assert_allclose(usage["head"]["entropy"], [1, 1], atol=1e-6)
    np.testing.assert_allclose(usage["tower"]["mean"], [[1.0] * 6, [2.0] * 6], atol=1e-6)
    assert "entropy" not in usage["tower"]


def test_clicked_only_scores_are_esmms_conditional_ones() -> None:
    torch.manual_seed(0)
    head, x = ctr.heads.ESMM((H,), num_tasks=3, hidden=(4,)), torch.randn(200, H)
    with torch.no_grad():
        happened = torch.bernoulli(head.conditional_logits(x).sigmoid()).cumprod(1)
        steps = ctr.analysis.step_scores(scores(head(x).numpy(), happened.numpy()))
        np.testing.assert_allclose(steps.logits, head.conditional_logits(x), rtol=1e-4, atol=1e-4)
    for task in (1, 2):
        rows = happened[:, task - 1] == 1
        found = ctr.metrics.auc(happened[rows, task], head.conditional_logits(x)[rows, task].detach())
        assert score(steps)["tasks"][task]["auc"] == pytest.approx(found, abs=1e-3)
        assert score(steps)["tasks"][task]["rows"] == int(rows.sum())


def test_a_recipe_of_several_labels_records_and_compares_each(tmp_path: Path) -> None:
    frame, _ = conflict(2000, num_tasks=2)
    labels = ("label_1", "label_2")
    features = [ctr.Categorical(name) for name in frame.columns[2:]]
    for kept in (labels, labels[:1], labels[1:]):
        folder = tmp_path / "_".join(["d", *(kept if len(kept) == 1 else ())])
        ctr.prepare(frame.drop(set(labels) - set(kept)), folder, features=features, labels=kept, log=None)
    (tmp_path / "recipes").mkdir()
    config = {"model": "shared_bottom", "embedding_dim": 4, "bottom_hidden": (8,), "tower_hidden": ()}
    arguments: dict[str, Any] = {"recipe": str(tmp_path / "recipes" / "x.py"), "data": "d", "script": ["none.py"]}
    arguments |= {
        "labels": labels,
        "config": config,
        "single": config,
        "batch_size": 500,
        "learning_rate": 0.02,
        "patience": 1,
    }
    knobs = LabelKnobs(data=tmp_path / "d", seed=3, record=True, device="cpu", report=tmp_path / "report")
    together = run_label_recipe(knobs, model="shared_bottom", **arguments)
    alone = run_label_recipe(dataclasses.replace(knobs, label="label_2", report=None), model="single_task", **arguments)
    with (tmp_path / "recipes" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["model"]) for row in rows] == [
        ("d, label_1", "shared_bottom"),
        ("d, label_2", "shared_bottom"),
        ("d, label_2", "single_task"),
    ]
    found = [*(task["auc"] for task in together["test_tasks"]), alone["test_auc"]]
    assert [float(row["test_auc"]) for row in rows] == pytest.approx(found, abs=1e-6)
    lines = [[line for line in json.loads(row["record"])["metrics"] if line["metric"] == "auc"] for row in rows]
    assert [[line["label"] for line in some] for some in lines] == [["label_1"], ["label_2"], ["label_2"]]
    assert [some[0]["value"] for some in lines] == pytest.approx(found, rel=1e-7)
    valid = [float(row["valid_auc"]) for row in rows]
    assert [sum(valid[:2]) / 2, valid[2]] == pytest.approx([together["valid_auc"], alone["valid_auc"]], abs=1e-6)
    tasks = json.loads((tmp_path / "report" / "transfer.json").read_text())["tasks"]
    assert [task["multi_auc"] for task in tasks] == pytest.approx(found[:2], abs=1e-6)
    assert tasks[1]["single_auc"] == pytest.approx(alone["test_auc"], abs=1e-6)
    for model, label in (("single_task", None), ("shared_bottom", "label_1"), ("single_task", "label_3")):
        with pytest.raises(SystemExit, match="single_task, and only that, takes a --label of label_1, label_2"):
            run_label_recipe(dataclasses.replace(knobs, label=label, report=None), model=model, **arguments)
