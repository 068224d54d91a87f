"""The cross networks against the papers' equations, TorchRec, their degree as polynomials, and published counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankMixtureCrossNet, VectorCrossNet

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Parallel
from ctrlib.towers.crossnet import CrossNet, CrossNetMix, CrossNetV2
from ctrlib.towers.mlp import MLP

M = TypeVar("M", bound=nn.Module)

test_variants = conforms(
    {
        "v1_one_layer": lambda s: CrossNet(s, num_layers=1),
        "mix": lambda s: CrossNetMix(s, num_layers=2, num_experts=3, rank=4),
        "mix_linear": lambda s: CrossNetMix(s, num_layers=2, num_experts=3, rank=4, activation=None),
        "mix_one_expert": lambda s: CrossNetMix(s, num_layers=2, num_experts=1, rank=4),
    }
)


def randomized(module: M, std: float = 0.5, seed: int = 0) -> M:
    """In float64, with every parameter, biases included, drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return module


def fields(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recursion(x_0: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """DCN's eq. 3 as it stands, one row at a time."""
    rows = []
    for row in x_0:
        x = row
        for w, b in zip(weight, bias):
            x = torch.outer(row, x) @ w + b + x
        rows.append(x)
    return torch.stack(rows)


def mixture(
    x_0: Tensor,
    us: list[Tensor],
    cs: list[Tensor] | None,
    vs: list[Tensor],
    biases: list[Tensor],
    gate: Tensor | None,
    g: Callable[[Tensor], Tensor],
) -> Tensor:
    """DCN V2's eqs. 3 and 4, one row and one expert at a time. U_l^i and V_l^i are (width, rank)."""
    rows = []
    for row in x_0:
        x = row
        for layer, (u, v, b) in enumerate(zip(us, vs, biases)):
            scores = torch.exp(gate @ x) if gate is not None else torch.ones(1, dtype=x.dtype)
            total = torch.zeros_like(x)
            for i in range(len(u)):
                low = v[i].T @ x
                if cs is not None:
                    low = g(cs[layer][i] @ g(low))
                total = total + scores[i] / scores.sum() * (row * (u[i] @ low + b))
            x = total + x
        rows.append(x)
    return torch.stack(rows)


def taken_apart(cross: CrossNetMix) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor], list[Tensor]]:
    """U, C, V and the biases of every layer, as in the paper: the tower keeps U^T and V^T."""
    cs = list(cross.c) if cross.activation is not None else None
    return [u.mT for u in cross.u], cs, [v.mT for v in cross.v], list(cross.bias)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_crossnet_is_the_recursion_of_equation_3(num_layers: int) -> None:
    cross = randomized(CrossNet((3, 2), num_layers=num_layers))
    x, target = fields(5, 6).requires_grad_(), fields(5, 6, seed=2)
    inputs = (x, *cross.parameters())
    expected = recursion(x, cross.weight, cross.bias)
    torch.testing.assert_close(cross(x.view(5, 3, 2)), expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * target).sum(), inputs)
    got = torch.autograd.grad((cross(x) * target).sum(), inputs)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_crossnet_keeps_its_digits_in_single_precision() -> None:
    # The shortcut must not lose digits against the recursion, large and opposite biases included.
    cross = randomized(CrossNet((4, 8), num_layers=4), std=0.3)
    with torch.no_grad():
        cross.bias[1:3] = 100 * cross.bias[1]
        cross.bias[2] *= -1
    x = fields(64, 32)
    exact = recursion(x, cross.weight, cross.bias)
    weight, bias, single = cross.weight.float(), cross.bias.float(), x.float()
    scale = exact.abs().max()
    of_recursion = (recursion(single, weight, bias).double() - exact).abs().max() / scale
    of_tower = (cross.float()(single).double() - exact).abs().max() / scale
    assert of_tower < max(3 * of_recursion.item(), 1e-6)


@pytest.mark.parametrize("num_layers", [1, 4])
def test_crossnet_agrees_with_torchrec(num_layers: int) -> None:
    cross = randomized(CrossNet((3, 2), num_layers=num_layers))
    peer = VectorCrossNet(6, num_layers).double()
    with torch.no_grad():
        for layer in range(num_layers):
            peer.kernels[layer].copy_(cross.weight[layer, :, None])
            peer.bias[layer].copy_(cross.bias[layer, :, None])
    x = fields(7, 6)
    torch.testing.assert_close(cross(x), peer(x), rtol=1e-12, atol=1e-12)


def test_crossnet_without_biases_only_scales_its_input() -> None:
    cross = randomized(CrossNet((3, 2), num_layers=3))
    nn.init.zeros_(cross.bias)
    x = fields(5, 6)
    ratio = cross(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1].expand(5, 6))
    torch.testing.assert_close(ratio[:, 0], (1 + x @ cross.weight.T).prod(1))  # with b = 0: prod_l (1 + x_0^T w_l)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: CrossNet((3, 2), num_layers=n),
        lambda n: CrossNetV2((3, 2), num_layers=n),
        lambda n: CrossNetMix((3, 2), num_layers=n, num_experts=1, rank=2, activation=None),
    ],
    ids=["v1", "v2", "mix"],
)
def test_every_layer_adds_one_degree(make: Callable[[int], nn.Module], num_layers: int) -> None:
    # Along a ray t x_0, L layers are a polynomial of degree L + 1 in t: its differences of order L + 2 vanish.
    cross = randomized(make(num_layers))
    degree = num_layers + 1
    steps = torch.arange(degree + 2, dtype=torch.float64)
    values = cross(steps[:, None] * fields(1, 6))
    assert values.diff(n=degree, dim=0).abs().amin() > 1e-6
    torch.testing.assert_close(
        values.diff(n=degree + 1, dim=0) / values.abs().amax(), torch.zeros(1, 6, dtype=torch.float64)
    )


@pytest.mark.parametrize("make", [CrossNet, CrossNetV2])
def test_renaming_the_inputs_renames_the_outputs(make: Callable[..., nn.Module]) -> None:
    cross = randomized(make((6,), num_layers=3))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    x = fields(4, 6)
    before = cross(x)
    with torch.no_grad():
        for parameter in cross.parameters():
            parameter.copy_(
                parameter[..., order] if make is CrossNet or parameter.dim() == 1 else parameter[order][:, order]
            )
    torch.testing.assert_close(cross(x[:, order]), before[:, order])


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, None])
def test_mixture_follows_equations_2_to_4(num_experts: int, activation: Callable[[Tensor], Tensor] | None) -> None:
    cross = CrossNetMix((3, 2), num_layers=3, num_experts=num_experts, rank=4, activation=activation)
    randomized(cross)
    us, cs, vs, biases = taken_apart(cross)
    gate = cross.gate.weight if cross.gate is not None else None
    x = fields(5, 6)
    expected = mixture(x, us, cs, vs, biases, gate, activation or (lambda low: low))
    torch.testing.assert_close(cross(x.view(5, 3, 2)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_mixture_agrees_with_torchrec(num_experts: int, activation: Callable[[Tensor], Tensor]) -> None:
    cross = CrossNetMix((3, 2), num_layers=2, num_experts=num_experts, rank=4, activation=activation)
    randomized(cross)
    peer = LowRankMixtureCrossNet(6, 2, num_experts=num_experts, low_rank=4, activation=activation).double()
    with torch.no_grad():
        for layer in range(2):
            peer.U_kernels[layer].copy_(cross.u[layer].mT)
            peer.V_kernels[layer].copy_(cross.v[layer])
            peer.C_kernels[layer].copy_(cross.c[layer])
            peer.bias[layer].copy_(cross.bias[layer][:, None])
        if cross.gate is not None:
            for expert, linear in enumerate(peer.gates):
                linear.weight.copy_(cross.gate.weight[expert : expert + 1])
    x = fields(7, 6)
    torch.testing.assert_close(cross(x), peer(x), rtol=1e-11, atol=1e-11)
    # Both leave out the gate of a single expert, so the counts agree too.
    assert sum(p.numel() for p in cross.parameters()) == sum(p.numel() for p in peer.parameters())


def test_full_rank_mixture_is_crossnet_v2() -> None:
    mix = CrossNetMix((6,), num_layers=2, num_experts=1, rank=6, activation=None)
    full = CrossNetV2((6,), num_layers=2)
    randomized(mix), randomized(full)
    with torch.no_grad():
        for v, u, bias, layer in zip(mix.v, mix.u, mix.bias, full.layers):
            v.copy_(torch.eye(6).unsqueeze(0))  # U V^T = W
            u.copy_(layer.weight.T.unsqueeze(0))
            bias.copy_(layer.bias)
    x = fields(5, 6)
    torch.testing.assert_close(mix(x), full(x))


def test_experts_are_a_set_and_equal_ones_are_one() -> None:
    mix = CrossNetMix((3, 2), num_layers=2, num_experts=3, rank=2)
    randomized(mix)
    x = fields(5, 6)
    before = mix(x)
    assert mix.gate is not None
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for parameter in (*mix.u, *mix.c, *mix.v, mix.gate.weight):
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(mix(x), before)
    one = CrossNetMix((3, 2), num_layers=2, num_experts=1, rank=2).double()
    with torch.no_grad():
        for single, many in zip((*one.u, *one.c, *one.v), (*mix.u, *mix.c, *mix.v)):
            many.copy_(many[:1].expand_as(many).clone())
            single.copy_(many[:1])
        for single, many in zip(one.bias, mix.bias):
            single.copy_(many)
    torch.testing.assert_close(mix(x), one(x))


def test_initial_weights_have_the_xavier_scale() -> None:
    torch.manual_seed(0)
    cross = CrossNet((40, 10), num_layers=50)
    assert cross.weight.std().item() == pytest.approx(math.sqrt(2 / 401), rel=0.02)
    assert not cross.bias.any()
    mix = CrossNetMix((40, 10), num_layers=1, num_experts=4, rank=32)
    for matrix, size in ((mix.u[0], 432), (mix.v[0], 432), (mix.c[0], 64)):
        assert matrix.std().item() == pytest.approx(math.sqrt(2 / size), rel=0.05)
    assert not mix.bias[0].any()


@pytest.mark.parametrize(
    ("in_shape", "num_layers", "published", "rows"),
    [((3, 10), 4, 1_238_661, 90_239), ((10, 10), 3, 418_591, 5_389)],
    ids=["movielens", "frappe"],
)
def test_published_parameter_counts_of_dcn(
    in_shape: tuple[int, int], num_layers: int, published: int, rows: int
) -> None:
    tower = Parallel(CrossNet(in_shape, num_layers=num_layers), MLP(in_shape, hidden=(400, 400, 400), batch_norm=True))
    head = LinearHead(tower.out_shape)
    width = in_shape[0] * in_shape[1]
    # Cross layers, hidden layers with batch normalisation, one logit over both.
    closed_form = num_layers * 2 * width
    closed_form += (width + 1) * 400 + 2 * 401 * 400 + 3 * 2 * 400 + (width + 400 + 1)
    network = sum(parameter.numel() for module in (tower, head) for parameter in module.parameters())
    assert network == closed_form == published - rows * 10


def test_parameter_count_of_the_mixture() -> None:
    # FuxiCTR's CrossNetMix: U, V and C of every expert, a bias for each layer, and one gate.
    mix = CrossNetMix((10, 10), num_layers=3, num_experts=4, rank=32)
    assert sum(p.numel() for p in mix.parameters()) == 3 * (2 * 4 * 100 * 32 + 4 * 32 * 32 + 100) + 4 * 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossNet((2, 4), num_layers=0), "at least one layer, got num_layers=0"),
        (lambda: CrossNetMix((2, 4), num_layers=0), "num_layers=0"),
        (lambda: CrossNetMix((2, 4), num_experts=0), "num_experts=0"),
        (lambda: CrossNetMix((2, 4), rank=0), "rank=0"),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
