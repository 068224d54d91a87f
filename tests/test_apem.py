"""APEM-style patterns: symmetry, cost, closed forms, and patterns that were planted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ctrlib as ctr
from ctrlib.towers.apem import APEM

B, NUM_FIELDS, D, T = 9, 6, 8, 3


def test_set_attention_does_not_care_about_the_order_of_fields() -> None:
    x, order = torch.randn(B, NUM_FIELDS, D), torch.randperm(NUM_FIELDS)
    attention = ctr.towers.SetAttention(D, num_groups=3)
    fields, groups = attention(x)
    permuted, same_groups = attention(x[:, order])
    torch.testing.assert_close(permuted, fields[:, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(same_groups, groups, rtol=0, atol=1e-6)


def test_folded_attention_is_multi_head_attention() -> None:
    """In both directions: that of torch with the same projections; and so is what a group reads of each field."""
    attention = ctr.towers.SetAttention(D, num_groups=3, num_heads=2)
    x, groups = torch.randn(B, NUM_FIELDS, D), torch.randn(B, 3, D)
    for block in (attention.gather, attention.scatter):
        folded, plain = block.attention, torch.nn.MultiheadAttention(D, 2, batch_first=True)
        with torch.no_grad():
            folded.bias.normal_()
            plain.in_proj_weight.copy_(torch.cat([folded.query, folded.key, folded.value]).flatten(0, 1))
            plain.in_proj_bias.zero_()
            plain.out_proj.weight.copy_(folded.out.flatten(0, 1).T)
            plain.out_proj.bias.copy_(folded.bias)
        points = attention.points.expand(B, -1, -1)
        read, weights = plain(points, x, x)
        torch.testing.assert_close(folded.gather(attention.points, x), read, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(folded.scatter(x, groups), plain(x, groups, groups)[0], rtol=1e-5, atol=1e-5)
        if block is attention.gather:
            torch.testing.assert_close(attention.attention(x), weights, rtol=1e-5, atol=1e-6)


def test_squeeze_and_excitation_knows_the_fields() -> None:
    """So that their order must stay: the same only if its weights are permuted with the fields."""
    x, order = torch.randn(B, NUM_FIELDS, D), torch.tensor([3, 0, 5, 1, 2, 4])
    tower = ctr.towers.APEM((NUM_FIELDS, D), num_tasks=T, num_groups=3, skip_dim=0)
    with torch.no_grad():
        for layer in (tower.blocks[0].excite[0], tower.blocks[0].excite[2]):
            torch.nn.init.normal_(layer.weight, std=2.0)
            torch.nn.init.normal_(layer.bias)
        before = tower.patterns(x)[1]
        assert (tower.patterns(x[:, order])[1] - before[:, order]).abs().max() > 1e-2
        first, _, last = tower.blocks[0].excite
        first.weight.copy_(first.weight[:, order])
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
        torch.testing.assert_close(tower.patterns(x[:, order])[1], before[:, order], rtol=0, atol=1e-5)


def test_cost_is_linear_in_the_number_of_fields() -> None:
    def flops(num_fields: int) -> int:
        attention = ctr.towers.SetAttention(16, num_groups=8)
        with FlopCounterMode(display=False) as counter:
            attention(torch.randn(2, num_fields, 16))
        return counter.get_total_flops()

    assert 1.9 < flops(512) / flops(256) < 2.01


def test_excitation_of_zero_weights_is_one_half() -> None:
    tower = ctr.towers.APEM((NUM_FIELDS, D), num_tasks=T, num_groups=3)
    with torch.no_grad():
        tower.blocks[0].excite[2].weight.zero_()
        tower.blocks[0].excite[2].bias.zero_()
    x = torch.randn(B, NUM_FIELDS, D)
    read, groups = tower.blocks[0].attention(x)
    patterns, fields = tower.patterns(x)
    torch.testing.assert_close(fields, x + 0.5 * read)
    torch.testing.assert_close(patterns, torch.cat([groups, fields.mean(1, keepdim=True)], dim=1))


def test_selection_follows_the_equations() -> None:
    tower = ctr.towers.APEM((NUM_FIELDS, D), num_tasks=T, num_groups=3, num_blocks=2, temperature=0.5, skip_dim=4)
    x = torch.randn(B, NUM_FIELDS, D)
    patterns, fields = tower.patterns(x)
    out = tower(x)
    weights = tower.gate_weights(x)
    for task in range(T):
        indicator = tower.indicators[task] + fields.mean(1) @ tower.adapt[task]
        scores = torch.stack([(tower.query(indicator) * tower.key(patterns[:, p])).sum(1) for p in range(4)], dim=1)
        torch.testing.assert_close(weights[task], (scores / (0.5 * D**0.5)).softmax(1))
        expected = torch.cat([(weights[task].unsqueeze(2) * patterns).sum(1), tower.skip(fields.flatten(1))], dim=1)
        torch.testing.assert_close(out[task], expected)


def test_each_task_selects_for_itself() -> None:
    tower = ctr.towers.APEM((NUM_FIELDS, D), num_tasks=T, num_groups=3)
    weights = tower.gate_weights(torch.randn(B, NUM_FIELDS, D))
    assert weights.shape == (T, B, 4) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(T, B))
    for task in range(T):
        found = torch.autograd.grad(weights[task, :, 0].sum(), [tower.indicators, tower.adapt], retain_graph=True)
        for grad in found:
            assert grad[task].abs().sum() > 0
            assert torch.count_nonzero(grad[[other for other in range(T) if other != task]]) == 0


def test_selection_is_float32_under_autocast() -> None:
    """In bfloat16 the sums would be off by up to 2^-8 for every pattern."""
    tower = APEM((NUM_FIELDS, D), num_tasks=T, num_groups=3)
    with torch.autocast("cpu", torch.bfloat16):
        weights = tower.gate_weights(torch.randn(B, NUM_FIELDS, D))
    torch.testing.assert_close(weights.sum(2), torch.ones(T, B), rtol=0, atol=1e-6)


def test_chain_finds_the_rates_of_a_table() -> None:
    """Free logits for each of 3 values: q_k = n_k / n_{k-1} at the optimum, and p_1 >= p_2 >= p_3 in every row."""
    counts = torch.tensor([[500.0, 300.0, 60.0, 20.0], [800.0, 80.0, 60.0, 50.0], [300.0, 290.0, 200.0, 10.0]])
    head = ctr.heads.ESMM((3,), num_tasks=3, hidden=()).double()
    rows, happened = torch.eye(3, dtype=torch.float64), counts[:, 1:].double()
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=800, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = head(rows)
        loss = (counts[:, :1] * F.softplus(logits) - happened * logits).sum() / counts[:, 0].sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = head.conditional_logits(rows).sigmoid()
    torch.testing.assert_close(found, (counts[:, 1:] / counts[:, :-1]).double(), rtol=0, atol=1e-6)
    assert (head(rows).diff(dim=1) <= 0).all()


def test_planted_patterns_are_found() -> None:
    """Task k's label depends on block k of the fields only: its selection falls on the group that reads that block."""
    torch.manual_seed(1)
    shape, every = (2, 2), torch.arange(4)  # two blocks of two fields
    tower = ctr.towers.APEM(
        (4, D), num_tasks=2, num_groups=2, num_heads=1, temperature=0.1, skip_dim=0, mean_pattern=False
    )
    head = ctr.heads.TaskTowers(tower.out_shape, num_tasks=2)
    # A field's vectors lie around a direction of its own.
    directions = torch.linalg.qr(torch.randn(D, D))[0][:4] * D**0.5
    vectors = torch.nn.Parameter(0.5 * torch.randn(4, 10, D) + 0.5 * directions.unsqueeze(1))
    effects = torch.randn(4, 10)
    optimiser = torch.optim.Adam([vectors, *tower.parameters(), *head.parameters()], lr=0.01)
    for _ in range(500):
        ids = torch.randint(10, (128, 4))
        labels = torch.bernoulli((2 * effects[every, ids].unflatten(1, shape).sum(2)).sigmoid())
        x = vectors[every, ids]
        loss = ctr.binary_cross_entropy(head(tower(x)), labels, torch.ones(128))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        selected = tower.gate_weights(x).mean(1)  # (tasks, groups)
        covered = tower.blocks[0].attention.attention(x).mean(0).unflatten(1, shape).sum(2)  # (groups, blocks)
    own = covered.argmax(0)
    assert own.tolist() in ([0, 1], [1, 0])
    for task in range(2):
        assert covered[own[task], task] > 0.6
        assert selected[task, own[task]] > 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 2, "num_heads": 3}, "do not divide into 3 heads"),
        ({"num_tasks": 0}, "one or more tasks"),
        ({"num_tasks": 2, "temperature": 0.0}, "a positive temperature"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ctr.towers.APEM((4, 8), **arguments)
