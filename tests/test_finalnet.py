"""FinalNet and its ensemble head against their equations written out, published parameter counts, planted terms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conformance import HEAD_SHAPE, conforms
from torch import Tensor, nn

from ctrlib.heads.ensemble import EnsembleHead
from ctrlib.heads.linear import LinearHead
from ctrlib.losses import collect_auxiliary, total_auxiliary
from ctrlib.metrics import auc
from ctrlib.towers.combine import Parallel
from ctrlib.towers.finalnet import FactorizedInteraction, FieldGate, FinalBlock

test_variants = conforms(
    {
        "one_block": lambda s: FinalBlock(s, hidden=(8, 6)),
        "gated": lambda s: FinalBlock(s, hidden=(4,), field_gate=True, dropout=0.2),
        "summed": lambda s: FinalBlock(s, hidden=(5, 3), concat=False, batch_norm=False),
    }
)


test_variants_of_the_head = conforms(
    {
        "three_branches": lambda s: EnsembleHead(s, widths=(1, 2, 3), num_tasks=3),
        "no_distillation": lambda s: EnsembleHead(s, widths=(4, 2), distill=False),
    },
    HEAD_SHAPE,
    head=True,
)


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def scatter(module: nn.Module) -> None:
    """Parameters and running statistics away from their starting values, so that each has its effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def layers_of(block: FinalBlock, kind: type[nn.Module]) -> list[nn.Module]:
    return [layer for layer in block.layers if isinstance(layer, kind)]


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("field_gate", [True, False])
def test_block_is_the_published_equation(concat: bool, field_gate: bool) -> None:
    torch.manual_seed(1)
    block = FinalBlock((3, 2), hidden=(6, 4), field_gate=field_gate, concat=concat, dropout=0.5).double().eval()
    scatter(block)
    x = torch.randn(7, 3, 2, dtype=torch.float64)
    rows = []
    for row in x:
        fields = [row[f] for f in range(3)]
        if field_gate:
            (gate,) = layers_of(block, FieldGate)
            weight, bias = gate.get_parameter("weight"), gate.get_parameter("bias")
            gates = [sum(weight[f, g] * row[g] for g in range(3)) + bias[f, 0] for f in range(3)]
            fields += [row[f] * gates[f] for f in range(3)]
        v = torch.cat(fields)
        for layer, norm in zip(layers_of(block, FactorizedInteraction), layers_of(block, nn.BatchNorm1d)):
            weight, bias = layer.get_parameter("linear.weight"), layer.get_parameter("linear.bias")
            h = torch.stack([(w * v).sum() + b for w, b in zip(weight, bias)])
            half = len(h) // 2
            products = [h[i] * h[half + i] for i in range(half)]
            terms = [*h[:half], *products] if concat else [h[i] + products[i] for i in range(half)]
            assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
            v = (torch.stack(terms) - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
            v = v.clamp(min=0)
        rows.append(v)
    torch.testing.assert_close(block(x), torch.stack(rows))


def test_layer_order_is_interaction_norm_relu_dropout() -> None:
    block = FinalBlock((3, 2), hidden=(6, 4), field_gate=True, dropout=0.5)
    each = ["FactorizedInteraction", "BatchNorm1d", "ReLU", "Dropout"]
    assert [type(layer).__name__ for layer in block.layers] == ["FieldGate", "Flatten", *each, *each]


@pytest.mark.parametrize("concat", [True, False])
def test_gradient_of_the_interaction(concat: bool) -> None:
    layer = FactorizedInteraction(5, 6, concat=concat).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    wide = torch.randn(4, 12, dtype=torch.float64)
    grads = []
    for plain in (False, True):
        weight = layer.linear.weight.detach().clone().requires_grad_()
        if plain:
            h_1, h_2 = F.linear(x, weight, layer.linear.bias).chunk(2, dim=1)
            out = torch.cat([h_1, h_1 * h_2], dim=1) if concat else h_1 + h_1 * h_2
        else:
            layer.linear.weight = nn.Parameter(weight)
            weight = layer.linear.weight
            out = layer(x)
        torch.autograd.backward(out, wide[:, : out.shape[1]])  # a gradient that is not contiguous
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_each_layer_doubles_the_degree() -> None:
    """On a line x = t v the output without activation is a polynomial in t of degree 2^L: its next difference is 0."""
    torch.manual_seed(0)
    for num_layers in (1, 2, 3):
        widths = [4, *[6] * num_layers]
        layers = nn.Sequential(*(FactorizedInteraction(a, b) for a, b in itertools.pairwise(widths))).double()
        scatter(layers)
        direction = torch.randn(4, dtype=torch.float64)
        degree = 2**num_layers
        points = layers(torch.arange(degree + 2, dtype=torch.float64)[:, None] * direction)
        differences = points
        for _ in range(degree):
            differences = differences.diff(dim=0)
        assert differences.abs().max() > 1e-3  # of degree 2^L ...
        assert (differences.diff(dim=0).abs().max() / points.abs().max()) < 1e-12  # ... and of no higher one


def test_field_gate_starts_as_a_copy_and_keeps_dimensions_apart() -> None:
    gate = FieldGate(3)
    x = torch.randn(5, 3, 4)
    assert torch.equal(gate(x), torch.cat([x, x], dim=1))
    scatter(gate)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(gate(x[:, :, order]), gate(x)[:, :, order])
    expected = x * (torch.einsum("fg,bgd->bfd", gate.weight, x) + gate.bias)
    torch.testing.assert_close(gate(x), torch.cat([x, expected], dim=1))


def test_ensemble_is_the_mean_of_the_branches_logits() -> None:
    head = EnsembleHead((7,), widths=(3, 4), num_tasks=2).double()
    scatter(head)
    x = torch.randn(6, 7, dtype=torch.float64)
    first, second = head.branches
    expected = [
        [
            sum(
                (branch.get_parameter("weight")[t] * row[columns]).sum() + branch.get_parameter("bias")[t]
                for branch, columns in ((first, slice(0, 3)), (second, slice(3, 7)))
            )
            / 2
            for t in range(2)
        ]
        for row in x
    ]
    torch.testing.assert_close(head(x), torch.stack([torch.stack(row) for row in expected]))


def distillation(head: EnsembleHead, x: Tensor) -> list[Tensor]:
    with collect_auxiliary() as losses:
        head(x)
    return losses


def test_distillation_is_fuxictrs_loss() -> None:
    torch.manual_seed(0)
    head = EnsembleHead((7,), widths=(3, 4), num_tasks=2)
    scatter(head)
    x = torch.randn(6, 7, requires_grad=True)
    (losses,) = distillation(head, x)
    z = [branch(part) for branch, part in zip(head.branches, (x[:, :3], x[:, 3:]))]
    p = ((z[0] + z[1]) / 2).sigmoid().detach()
    q = [torch.sigmoid(logits) for logits in z]
    by_hand = sum(-(p * qn.log() + (1 - p) * (1 - qn).log()) for qn in q)
    assert isinstance(by_hand, Tensor)
    torch.testing.assert_close(losses, by_hand.sum(1))  # summed over labels, one loss a row
    # FuxiCTR: loss + mean BCE(y_1, y) + mean BCE(y_2, y), y without gradient.
    published = sum(F.binary_cross_entropy(qn, p) for qn in q) * 2  # its mean is over labels too
    assert isinstance(published, Tensor)
    torch.testing.assert_close(total_auxiliary([losses], torch.ones(6)), published)
    # The target passes no gradient: each branch is moved by q_n - p only.
    (grad_x,) = torch.autograd.grad(losses.sum(), x)
    expected = torch.cat([(qn - p) @ branch.get_parameter("weight") for qn, branch in zip(q, head.branches)], dim=1)
    torch.testing.assert_close(grad_x, expected)


def test_distillation_happens_in_training_only() -> None:
    head = EnsembleHead((4,), widths=(2, 2))
    x = torch.randn(3, 4)
    assert [tuple(loss.shape) for loss in distillation(head, x)] == [(3,)]
    assert distillation(head.eval(), x) == []
    assert distillation(EnsembleHead((4,), widths=(2, 2), distill=False), x) == []


def test_distillation_pulls_the_branches_together() -> None:
    torch.manual_seed(0)
    head = EnsembleHead((4,), widths=(2, 2))
    x = torch.randn(256, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    gaps = []
    for _ in range(200):
        first, second = (branch(part) for branch, part in zip(head.branches, (x[:, :2], x[:, 2:])))
        gaps.append((first - second).square().mean().item())
        optimizer.zero_grad()
        torch.autograd.backward(total_auxiliary(distillation(head, x), torch.ones(256)))
        optimizer.step()
    # The branches see different columns, so they can agree on constants only.
    assert gaps[-1] < 0.01 * gaps[0]


# Rows of the log files: values, padding and out of vocabulary.
MOVIELENS_ROWS = 16_977 + 23_606 + 49_659
FRAPPE_ROWS = 5_399


def two_blocks(shape: tuple[int, int], hidden: Sequence[Sequence[int]], dropout: float) -> list[nn.Module]:
    tower = Parallel(
        FinalBlock(shape, hidden=hidden[0], field_gate=True, dropout=dropout),
        FinalBlock(shape, hidden=hidden[1], dropout=dropout),
    )
    return [tower, EnsembleHead(tower.out_shape, widths=(hidden[0][-1], hidden[1][-1]))]


def one_block(shape: tuple[int, int], hidden: Sequence[int], dropout: float) -> list[nn.Module]:
    tower = FinalBlock(shape, hidden=hidden, dropout=dropout)
    return [tower, LinearHead(tower.out_shape)]


@pytest.mark.parametrize(
    ("make", "embedding_weights", "published"),
    [
        (lambda: two_blocks((3, 10), ([400, 400], [500]), 0.0), MOVIELENS_ROWS * 10, 1_106_234),
        (lambda: one_block((3, 10), [400], 0.1), MOVIELENS_ROWS * 10, 916_021),
        (lambda: two_blocks((10, 10), ([400, 400], [400]), 0.1), FRAPPE_ROWS * 10, 338_502),
        (lambda: one_block((10, 10), [400, 400], 0.2), FRAPPE_ROWS * 10, 256_791),
        # 13 numeric vectors and 26 tables.
        (lambda: two_blocks((39, 10), ([400, 400], [400, 400]), 0.1), (13 + 2_086_329) * 10, 21_658_582),
    ],
    ids=["movielens_2b", "movielens_1b", "frappe_2b", "frappe_1b", "criteo_x1_2b"],
)
def test_published_parameter_counts(
    make: Callable[[], list[nn.Module]], embedding_weights: int, published: int
) -> None:
    assert num_parameters(*make()) + embedding_weights == published


def test_planted_products() -> None:
    """The label depends on <x_1, x_2> alone: a linear layer sees nothing, one FINAL layer all there is."""
    generator = torch.Generator().manual_seed(0)
    num_rows = 16_000
    x = torch.randn(num_rows, 2, 8, generator=generator)
    truth = x.prod(dim=1).sum(1)
    y = torch.bernoulli(truth.sigmoid(), generator=generator)
    half = num_rows // 2
    makes: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 16)),
        "layer": lambda: nn.Sequential(nn.Flatten(), FactorizedInteraction(16, 16)),
        "block": lambda: FinalBlock((2, 8), hidden=(32,)),
    }
    scores = {}
    for name, make in makes.items():
        torch.manual_seed(0)
        network = nn.Sequential(make(), LinearHead((32 if name == "block" else 16,)))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for step in range(320):
            rows = slice(step % 8 * 1000, (step % 8 + 1) * 1000)
            optimizer.zero_grad()
            torch.autograd.backward(F.binary_cross_entropy_with_logits(network(x[rows])[:, 0], y[rows]))
            optimizer.step()
        network.eval()
        with torch.no_grad():
            scores[name] = auc(y[half:].numpy(), network(x[half:])[:, 0].numpy())
    bayes = auc(y[half:].numpy(), truth[half:].numpy())
    assert bayes > 0.9
    assert scores["linear"] == pytest.approx(0.5, abs=0.02)
    assert scores["layer"] > bayes - 0.01
    assert scores["block"] > bayes - 0.025


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FinalBlock((3, 4), hidden=()), "one or more positive"),
        (lambda: FinalBlock((3, 4), hidden=(4, 0)), r"got \(4, 0\)"),
        (lambda: FinalBlock((3, 4), hidden=(5,)), "got 5 outputs: take an even number"),
        (lambda: EnsembleHead((5,), widths=(2, 2)), r"add up to the tower's width 5, got \(2, 2\)"),
        (lambda: EnsembleHead((5,), widths=(5,)), "LinearHead for one branch"),
        (lambda: EnsembleHead((5,), widths=(5, 0)), r"got \(5, 0\)"),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
