"""CIN against equations 6 and 7 of the xDeepFM paper, and the parameter counts of BARS' xDeepFM."""

from __future__ import annotations

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from ctrlib.heads.linear import LinearHead
from ctrlib.towers import cin as module
from ctrlib.towers.cin import CIN
from ctrlib.towers.combine import Parallel
from ctrlib.towers.mlp import MLP


def randomised(tower: CIN, seed: int = 0) -> CIN:
    """In double precision, biases drawn too."""
    generator = torch.Generator().manual_seed(seed)
    tower.double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return tower


def equations_6_and_7(tower: CIN, x_BFD: Tensor) -> Tensor:
    """Every layer in full, one feature map, one pair of rows at a time."""
    num_fields, x_k, pooled = x_BFD.shape[1], x_BFD, []
    for layer in tower.layers:
        maps = []
        for h in range(layer.out_features):
            row = torch.zeros_like(x_BFD[:, 0])
            for i in range(x_k.shape[1]):
                for j in range(num_fields):
                    row = row + layer.weight[h, j * x_k.shape[1] + i] * x_k[:, i] * x_BFD[:, j]
            maps.append(row if layer.bias is None else row + layer.bias[h])
        x_k = torch.stack(maps, dim=1)
        pooled.append(x_k.sum(2))
    return torch.cat(pooled, dim=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_maps", [(4,), (3, 5), (2, 3, 4)])
def test_outputs_and_gradients_follow_the_equations(num_maps: tuple[int, ...], bias: bool) -> None:
    tower = randomised(CIN((3, 4), num_maps=num_maps, bias=bias))
    x = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    expected, got = equations_6_and_7(tower, x), tower(x)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    inputs = [x, *tower.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )


@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 13])
def test_blocks_of_rows_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", 6)
    x_0, x_k = (torch.randn(rows, n, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    weight = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("rf,rh,ofh->ro", x_0, x_k, weight.view(5, 3, 4))
    got = module._compress(x_0, x_k, weight)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x_0, x_k, weight), direction),
        torch.autograd.grad(expected, (x_0, x_k, weight), direction),
    )


def test_gradients_by_finite_differences() -> None:
    tower = randomised(CIN((2, 3), num_maps=(2, 2, 2)))
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tower, x)


def test_gradients_are_right_where_only_some_are_wanted() -> None:
    tower = randomised(CIN((3, 4), num_maps=(4, 4)))
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    expected = torch.autograd.grad(equations_6_and_7(tower, x).square().sum(), list(tower.parameters()))
    torch.testing.assert_close(torch.autograd.grad(tower(x).square().sum(), list(tower.parameters())), expected)
    tower.requires_grad_(False)
    x.requires_grad_()
    expected = torch.autograd.grad(equations_6_and_7(tower, x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(tower(x).square().sum(), x), expected)


def test_by_hand() -> None:
    # X^0 = [[1, 2], [3, 4]]; X^1 = X_0 o X_1 = [3, 8], pooled 11; X^2 = X^1 o (X_0 - X_1) = [-6, -16], pooled -22.
    tower = CIN((2, 2), num_maps=(1, 1), bias=False)
    with torch.no_grad():
        tower.layers[0].weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
        tower.layers[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
    assert tower(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist() == [[11.0, -22.0]]


def test_layer_k_is_homogeneous_of_degree_k_plus_1() -> None:
    tower = randomised(CIN((4, 5), num_maps=(2, 3, 2), bias=False))
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    degrees = torch.tensor([2.0] * 2 + [3.0] * 3 + [4.0] * 2, dtype=torch.float64)
    torch.testing.assert_close(tower(1.7 * x), tower(x) * 1.7**degrees)


def test_interactions_are_vector_wise() -> None:
    """Positions of the embedding never mix, so their order cannot matter."""
    tower = randomised(CIN((4, 6), num_maps=(3, 3, 3)))
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(tower(x[:, :, torch.randperm(6)]), tower(x))


def test_one_map_of_ones_over_pairs_is_fm() -> None:
    """As the paper says of its relation to FM: one layer, one map, and W_ij = 1 for i < j."""
    tower = CIN((5, 3), num_maps=(1,), bias=False).double()
    with torch.no_grad():
        tower.layers[0].weight.copy_(torch.ones(5, 5, dtype=torch.float64).triu(1).view(1, -1))
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    pairs = (x.sum(1).square() - x.square().sum(1)).sum(1, keepdim=True) / 2
    torch.testing.assert_close(tower(x), pairs)


def test_same_numbers_as_the_convolution_form() -> None:
    """FuxiCTR's form: outer products (B, F * H, D) and `nn.Conv1d` of width 1, whose weights can be taken over."""
    tower = randomised(CIN((3, 4), num_maps=(5, 6)))
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    x_k, pooled = x, []
    for layer in tower.layers:
        convolution = nn.Conv1d(layer.in_features, layer.out_features, 1).double()
        convolution.load_state_dict({"weight": layer.weight.unsqueeze(2), "bias": layer.bias})
        x_k = convolution(torch.einsum("bfd,bhd->bfhd", x, x_k).flatten(1, 2))
        pooled.append(x_k.sum(2))
    torch.testing.assert_close(tower(x), torch.cat(pooled, dim=1))


@pytest.mark.parametrize(
    ("num_fields", "num_maps", "batch_norm", "published", "rows"),
    [
        (3, (64, 64, 64), False, 1_351_767, 90_239),
        (10, (64,), True, 429_809, 5_389),
    ],
    ids=["movielens_latest", "frappe"],
)
def test_published_parameter_counts_of_xdeepfm(
    num_fields: int, num_maps: tuple[int, ...], batch_norm: bool, published: int, rows: int
) -> None:
    shape = (num_fields, 10)
    mlp = MLP(shape, hidden=(400, 400, 400), batch_norm=batch_norm, dropout=0.2)
    tower = Parallel(mlp, CIN(shape, num_maps=num_maps))
    network = sum(parameter.numel() for part in (tower, LinearHead(tower.out_shape)) for parameter in part.parameters())
    # Embeddings of width 10 and 1; FuxiCTR's CIN and MLP end in a linear layer with a bias each, which add up.
    assert network == published - rows * 11 - 1


def test_starts_like_fuxictr() -> None:
    torch.manual_seed(0)
    tower = CIN((20, 4), num_maps=(64, 64))
    for layer in tower.layers:
        assert not layer.bias.any()
        expected = (2 / (layer.in_features + layer.out_features)) ** 0.5  # Xavier normal
        assert abs(layer.weight.std().item() / expected - 1) < 0.02


test_variants = conforms(
    {
        "one_layer": lambda shape: CIN(shape, num_maps=(6,)),
        "without_bias": lambda shape: CIN(shape, num_maps=(6, 4, 8), bias=False),
    }
)


def test_products_of_products_are_not_rounded_under_autocast() -> None:
    torch.manual_seed(0)
    tower, x = CIN((5, 8), num_maps=(6, 4, 3)), torch.randn(7, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = tower(x)
    # All layers but the last, which is an inner product.
    assert torch.equal(low[:, :10], tower(x)[:, :10])


def test_refuses_layers_without_maps() -> None:
    for num_maps in ((), (4, 0)):
        with pytest.raises(ValueError, match="num_maps must be one or more positive integers"):
            CIN((3, 4), num_maps=num_maps)


def test_learns_a_third_order_interaction_that_one_layer_cannot() -> None:
    """Planted: y = sign of sum_d e_1 e_2 e_3; a second layer has this product, a first one only pairs."""
    accuracy = {}
    for num_maps in ((8,), (8, 8)):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        x = torch.randn(2048, 4, 2, generator=generator)
        labels = ((x[:, 0] * x[:, 1] * x[:, 2]).sum(1) > 0).float()
        train, test = slice(0, 1024), slice(1024, 2048)
        tower = CIN((4, 2), num_maps=num_maps)
        head = LinearHead(tower.out_shape)
        optimiser = torch.optim.Adam([*tower.parameters(), *head.parameters()], lr=0.02)
        for _ in range(200):
            optimiser.zero_grad()
            logits = head(tower(x[train]))[:, 0]
            torch.autograd.backward(nn.functional.binary_cross_entropy_with_logits(logits, labels[train]))
            optimiser.step()
        accuracy[num_maps] = ((head(tower(x[test]))[:, 0] > 0) == (labels[test] > 0)).float().mean().item()
        assert torch.isfinite(parameters_to_vector(tower.parameters())).all()
    assert accuracy[(8, 8)] > 0.95
    assert accuracy[(8,)] < 0.6
