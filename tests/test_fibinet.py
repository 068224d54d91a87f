"""FiBiNET against its equations in loops over pairs, and the parameter counts of BARS."""

from __future__ import annotations

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Stack
from ctrlib.towers.fibinet import Bilinear, FiBiNET
from ctrlib.towers.mlp import MLP

KINDS: tuple[Bilinear, ...] = ("field_all", "field_each", "field_interaction")


def randomised(tower: FiBiNET) -> FiBiNET:
    """In double precision, with excitations that are mostly above zero."""
    tower.double()
    with torch.no_grad():
        tower.excitation[0].weight.normal_()
        tower.excitation[2].weight.uniform_(0, 1)
        tower.weight.normal_()
    return tower


def by_loops(tower: FiBiNET, kind: Bilinear, x: Tensor) -> Tensor:
    num_fields = x.shape[1]
    squeezed = torch.stack([x[:, i].sum(1) / x.shape[2] for i in range(num_fields)], dim=1)
    hidden = torch.relu(squeezed @ tower.excitation[0].weight.T)
    importance = torch.relu(hidden @ tower.excitation[2].weight.T)
    blocks = []
    for copy, fields in enumerate((x, torch.stack([importance[:, [i]] * x[:, i] for i in range(num_fields)], dim=1))):
        matrices = tower.weight[copy if len(tower.weight) == 2 else 0]
        pair = 0
        for i in range(num_fields):
            for j in range(i + 1, num_fields):
                matrix = matrices[{"field_all": 0, "field_each": i, "field_interaction": pair}[kind]]
                blocks.append((fields[:, i] @ matrix) * fields[:, j])
                pair += 1
    return torch.cat(blocks, dim=1)


@pytest.mark.parametrize("share_bilinear", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_fields", [2, 5])
def test_outputs_and_gradients_follow_the_equations(num_fields: int, kind: Bilinear, share_bilinear: bool) -> None:
    torch.manual_seed(0)
    shape = (num_fields, 3)
    tower = randomised(FiBiNET(shape, bilinear=kind, reduction_ratio=0.5, share_bilinear=share_bilinear))
    x = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    expected, got = by_loops(tower, kind, x), tower(x)
    torch.testing.assert_close(got, expected)
    direction, inputs = torch.randn_like(expected), [x, *tower.parameters()]
    gradients = torch.autograd.grad(expected, inputs, direction)
    assert all(gradient.any() for gradient in gradients)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, direction), gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind: Bilinear) -> None:
    torch.manual_seed(0)
    tower = randomised(FiBiNET((3, 2), bilinear=kind, reduction_ratio=0.5))
    assert torch.autograd.gradcheck(tower, torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True))


def test_by_hand() -> None:
    # z = [2, 1]; hidden = ReLU(2 - 1) = 1; a = ReLU([2, -1]) = [2, 0]; v = [[2, 6], [0, 0]].
    # p = ([1, 3] W) * [2, 0] with W the exchange of both: [3, 1] * [2, 0] = [6, 0]; q = 0.
    tower = FiBiNET((2, 2), bilinear="field_all", reduction_ratio=2)
    with torch.no_grad():
        tower.excitation[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        tower.excitation[2].weight.copy_(torch.tensor([[2.0], [-1.0]]))
        tower.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    x = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]])
    assert tower(x).tolist() == [[6.0, 0.0, 0.0, 0.0]]
    with torch.no_grad():
        tower.excitation[2].weight.fill_(2.0)  # a = [2, 2], so q = 4 p
    assert tower(x).tolist() == [[6.0, 0.0, 24.0, 0.0]]


def test_identity_matrices_give_hadamard_products_scaled_by_both_importances() -> None:
    torch.manual_seed(0)
    tower = randomised(FiBiNET((4, 3), bilinear="field_each", reduction_ratio=1))
    with torch.no_grad():
        tower.weight.copy_(torch.eye(3, dtype=torch.float64).expand_as(tower.weight))
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    first, second = torch.triu_indices(4, 4, offset=1)
    p, q = tower(x).view(5, 2, 6, 3).unbind(1)
    importance = tower.excitation(x.mean(2))
    torch.testing.assert_close(p, x[:, first] * x[:, second])
    torch.testing.assert_close(q, p * (importance[:, first] * importance[:, second]).unsqueeze(2))
    torch.testing.assert_close(p.sum((1, 2)), (x.sum(1).square() - x.square().sum(1)).sum(1) / 2)


def test_three_types_agree_where_all_matrices_are_equal() -> None:
    torch.manual_seed(0)
    reference = randomised(FiBiNET((5, 3), bilinear="field_all"))
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    for kind in KINDS:
        tower = FiBiNET((5, 3), bilinear=kind).double()
        tower.excitation.load_state_dict(reference.excitation.state_dict())
        with torch.no_grad():
            tower.weight.copy_(reference.weight.expand_as(tower.weight))
        torch.testing.assert_close(tower(x), reference(x))


@pytest.mark.parametrize(
    ("num_fields", "ratio", "published", "rows"),
    [(3, 0.3, 1_340_790, 90_239), (10, 2, 743_480, 5_389)],
    ids=["movielens", "frappe"],
)
def test_published_parameter_counts(num_fields: int, ratio: float, published: int, rows: int) -> None:
    fibinet = FiBiNET((num_fields, 10), bilinear="field_all", reduction_ratio=ratio, share_bilinear=True)
    tower = Stack(fibinet, MLP(fibinet.out_shape, hidden=(400, 400, 400), batch_norm=True, dropout=0.3))
    network = sum(parameter.numel() for part in (tower, LinearHead(tower.out_shape)) for parameter in part.parameters())
    assert network == published - rows * 11  # embeddings of width 10 and 1; the wide part has no bias of its own
    own = FiBiNET((num_fields, 10), bilinear="field_all", reduction_ratio=ratio)
    assert own.weight.numel() == fibinet.weight.numel() + 10 * 10


@pytest.mark.parametrize(("ratio", "reduced"), [(3, 3), (2, 5), (0.3, 33), (100, 1)])
def test_width_of_the_squeezed_layer(ratio: float, reduced: int) -> None:
    assert FiBiNET((10, 4), reduction_ratio=ratio).excitation[0].weight.shape == (reduced, 10)


def test_each_matrix_starts_xavier_normal() -> None:
    torch.manual_seed(0)
    weight = FiBiNET((8, 16)).weight
    assert weight.shape == (2, 28, 16, 16)
    assert abs(weight.std().item() / (2 / (16 + 16)) ** 0.5 - 1) < 0.02


test_variants = conforms(
    {
        "all": lambda shape: FiBiNET(shape, bilinear="field_all", share_bilinear=True),
        "each": lambda shape: FiBiNET(shape, bilinear="field_each", reduction_ratio=0.5),
        "interaction": lambda shape: FiBiNET(shape, bilinear="field_interaction", share_bilinear=True),
    }
)


def test_wrong_use_says_how_to_mend_it() -> None:
    with pytest.raises(ValueError, match="at least 2 fields to form a pair, got 1: use MLP, or add a feature"):
        FiBiNET((1, 4))
    for ratio in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="reduction_ratio must be positive"):
            FiBiNET((3, 4), reduction_ratio=ratio)
    with pytest.raises(ValueError, match=r"bilinear must be one of .*'field_all'.* got 'all'"):
        FiBiNET((3, 4), bilinear="all")  # type: ignore[arg-type]


def test_learns_a_product_across_positions_that_needs_the_matrix() -> None:
    """Planted: y = sign of <e_1 S, e_2>, S a rotation by a quarter turn; a linear head reads it off the products."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 3, 2, generator=generator)
    labels = ((x[:, 0] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * x[:, 1]).sum(1) > 0).float()
    accuracy = {}
    for learn in (True, False):
        torch.manual_seed(0)
        tower = FiBiNET((3, 2), bilinear="field_all")
        if not learn:
            tower.weight.requires_grad_(False).copy_(torch.eye(2))
        head = LinearHead(tower.out_shape)
        wanted = [parameter for part in (tower, head) for parameter in part.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(wanted, lr=0.02)
        for _ in range(200):
            optimiser.zero_grad()
            logits = head(tower(x[:1024]))[:, 0]
            torch.autograd.backward(nn.functional.binary_cross_entropy_with_logits(logits, labels[:1024]))
            optimiser.step()
        accuracy[learn] = ((head(tower(x[1024:]))[:, 0] > 0) == (labels[1024:] > 0)).float().mean().item()
    assert accuracy[True] > 0.95
    assert accuracy[False] < 0.6
