"""IPNN against the products written out, and the parameter counts of BARS' IPNN."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Stack
from ctrlib.towers.ipnn import IPNN
from ctrlib.towers.mlp import MLP


def fields_and_products(x: Tensor) -> Tensor:
    num_fields = x.shape[1]
    products = [(x[:, i] * x[:, j]).sum(1) for i in range(num_fields) for j in range(i + 1, num_fields)]
    return torch.cat([*x.unbind(1), torch.stack(products, dim=1)], dim=1)


@pytest.mark.parametrize("num_fields", [2, 3, 7])
def test_outputs_and_gradients_are_those_of_the_pairs_written_out(num_fields: int) -> None:
    x = torch.randn(5, num_fields, 4, dtype=torch.float64, requires_grad=True)
    expected, got = fields_and_products(x), IPNN((num_fields, 4))(x)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(got, x, direction), torch.autograd.grad(expected, x, direction))
    assert torch.autograd.gradcheck(IPNN((num_fields, 4)), x)


def test_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]]])
    assert IPNN((3, 2))(x).tolist() == [[1.0, 2.0, 3.0, -1.0, 0.5, 4.0, 1.0, 8.5, -2.5]]


def test_products_sum_to_fm_and_ignore_rotations() -> None:
    tower = IPNN((6, 5))
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    products = tower(x)[:, 30:]
    torch.testing.assert_close(products.sum(1), (x.sum(1).square() - x.square().sum(1)).sum(1) / 2)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    torch.testing.assert_close(tower(x @ rotation)[:, 30:], products)


def test_reordered_fields_reorder_the_products() -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    order = torch.randperm(5)
    number = {pair: k for k, pair in enumerate(itertools.combinations(range(5), 2))}
    moved = [number[tuple(sorted((int(order[i]), int(order[j]))))] for i, j in number]  # type: ignore[index]
    torch.testing.assert_close(IPNN((5, 3))(x[:, order])[:, 15:], IPNN((5, 3))(x)[:, 15:][:, moved])


@pytest.mark.parametrize(
    ("num_fields", "published", "rows"), [(3, 1_237_191, 90_239), (10, 433_491, 5_389)], ids=["movielens", "frappe"]
)
def test_published_parameter_counts(num_fields: int, published: int, rows: int) -> None:
    products = IPNN((num_fields, 10))
    tower = Stack(products, MLP(products.out_shape, hidden=(400, 400, 400), dropout=0.1))
    network = sum(parameter.numel() for part in (tower, LinearHead(tower.out_shape)) for parameter in part.parameters())
    assert network == published - rows * 10


def test_positions_are_derived_from_the_shape_and_not_saved() -> None:
    assert not IPNN((4, 3)).state_dict()


def test_refuses_a_single_field() -> None:
    with pytest.raises(ValueError, match="at least 2 fields to form a pair, got 1: use MLP, or add a feature"):
        IPNN((1, 4))


def test_a_linear_head_on_the_products_learns_signs_that_no_field_shows_alone() -> None:
    """Planted: the logit is 1.5 times a sign that depends on two ids; the best AUC is sigmoid(1.5) = 0.8176."""
    signs = torch.ones(1, 1)
    for _ in range(3):  # Hadamard's matrix of order 8, by Sylvester's doubling
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    # Without the first row and column, and doubled once more, so that every row and every column sums to 0.
    signs = torch.kron(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), signs[1:, 1:])
    chance = torch.sigmoid(1.5 * signs).flatten()  # of a positive label in each cell
    left, right = torch.cartesian_prod(torch.arange(14), torch.arange(14)).unbind(1)

    def trained_auc(keep_products: bool) -> float:
        torch.manual_seed(0)
        tables = nn.Parameter(0.3 * torch.randn(2, 14, 8))
        products = IPNN((2, 8))
        head = LinearHead(products.out_shape)
        mask = torch.ones(17)
        mask[16] = float(keep_products)
        optimiser = torch.optim.Adam([tables, *head.parameters()], lr=0.02)
        for _ in range(200):
            optimiser.zero_grad()
            logits = head(products(torch.stack([tables[0, left], tables[1, right]], dim=1)) * mask)[:, 0]
            torch.autograd.backward(nn.functional.binary_cross_entropy_with_logits(logits, chance))
            optimiser.step()
        logits = logits.detach().round(decimals=3)
        wins = (logits[:, None] > logits).double() + 0.5 * (logits[:, None] == logits)
        weights = chance.double()[:, None] * (1 - chance.double())
        return ((wins * weights).sum() / weights.sum()).item()

    assert trained_auc(keep_products=True) > 0.8176 - 0.002
    assert abs(trained_auc(keep_products=False) - 0.5) < 0.01
