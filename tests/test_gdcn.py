"""The gated cross network against its equation, its limits, and CrossNetV2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Parallel, Stack
from ctrlib.towers.crossnet import CrossNetV2
from ctrlib.towers.gdcn import GatedCrossNet
from ctrlib.towers.mlp import MLP


def gated(num_layers: int = 3, seed: int = 0) -> GatedCrossNet:
    generator = torch.Generator().manual_seed(seed)
    cross = GatedCrossNet((3, 2), num_layers=num_layers).double()
    with torch.no_grad():
        for parameter in cross.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return cross


def fields(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ungated(cross: GatedCrossNet, factor: float) -> CrossNetV2:
    """The cross network whose W and b are those of `cross` times a number."""
    plain = CrossNetV2((3, 2), num_layers=len(cross.crosses)).double()
    with torch.no_grad():
        for layer, crossing in zip(plain.layers, cross.crosses):
            layer.weight.copy_(factor * crossing.weight)
            layer.bias.copy_(factor * crossing.bias)
    return plain


@pytest.mark.parametrize("num_layers", [1, 3])
def test_gated_cross_layer_equation_element_by_element(num_layers: int) -> None:
    cross = gated(num_layers)
    x = fields(4, 6)
    expected = torch.empty_like(x)
    for row in range(4):
        c_0 = c = x[row].tolist()
        for crossing, gate in zip(cross.crosses, cross.gates):
            w, b, w_g = crossing.weight.tolist(), crossing.bias.tolist(), gate.weight.tolist()
            nxt = []
            for i in range(6):
                crossed = sum(w[i][j] * c[j] for j in range(6)) + b[i]
                score = torch.tensor(sum(w_g[i][j] * c[j] for j in range(6)), dtype=torch.float64)
                nxt.append(c_0[i] * crossed / (1 + torch.exp(-score).item()) + c[i])
            c = nxt
        expected[row] = torch.tensor(c, dtype=torch.float64)
    torch.testing.assert_close(cross(x.view(4, 3, 2)), expected, rtol=1e-11, atol=1e-11)


def test_gradients_are_right() -> None:
    cross = gated(2)
    assert torch.autograd.gradcheck(cross, fields(3, 6).requires_grad_())


def test_undecided_gates_halve_the_cross_network() -> None:
    cross = gated()
    for gate in cross.gates:
        nn.init.zeros_(gate.weight)
    x = fields(5, 6)
    torch.testing.assert_close(cross(x), ungated(cross, 0.5)(x))


def test_open_gates_are_the_cross_network_and_closed_ones_the_identity() -> None:
    # On positive inputs a gate with one large weight per output is open, or closed, by its sign: with non-negative
    # crossings no c_l has a lower element than c_0 has.
    cross = gated()
    x = fields(5, 6).abs() + 0.1
    with torch.no_grad():
        for crossing in cross.crosses:
            crossing.weight.abs_()
            crossing.bias.abs_()
    for sign, expected in ((1.0, ungated(cross, 1.0)(x)), (-1.0, x)):
        for gate in cross.gates:
            nn.init.constant_(gate.weight, sign * 1e4)
        torch.testing.assert_close(cross(x), expected)


def test_a_gate_acts_on_its_own_element_only() -> None:
    cross = gated(num_layers=1)
    x = fields(5, 6)
    before = cross(x)
    with torch.no_grad():
        cross.gates[0].weight[2] += 1.0
    changed = (cross(x) != before).any(0)
    assert changed.tolist() == [False, False, True, False, False, False]


def test_initial_biases_are_those_of_the_authors_code() -> None:
    torch.manual_seed(0)
    cross = GatedCrossNet((40, 10), num_layers=2)
    biases = torch.stack([crossing.bias for crossing in cross.crosses])
    assert biases.min() >= 0 and biases.max() < 1
    assert biases.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 800) ** 0.5)
    for layer in (*cross.crosses, *cross.gates):
        assert layer.weight.std().item() == pytest.approx(1 / 20, rel=0.02)  # sqrt(2 / 800)


@pytest.mark.parametrize(("in_shape", "num_layers"), [((3, 10), 5), ((10, 10), 4)], ids=["movielens", "frappe"])
def test_parallel_gdcn_has_the_parameters_of_dcnv2_and_the_gates(in_shape: tuple[int, int], num_layers: int) -> None:
    def count(cross: nn.Module) -> int:
        tower = Parallel(cross, MLP(in_shape, hidden=(400, 400, 400), batch_norm=True))
        return sum(p.numel() for part in (tower, LinearHead(tower.out_shape)) for p in part.parameters())

    width = in_shape[0] * in_shape[1]
    dcnv2 = {30: 1_243_071 - 902_390, 100: 458_391 - 53_890}[width]  # BARS, without embeddings
    assert count(CrossNetV2(in_shape, num_layers=num_layers)) == dcnv2
    assert count(GatedCrossNet(in_shape, num_layers=num_layers)) == dcnv2 + num_layers * width**2


def test_stacked_gdcn_is_the_mlp_on_the_crossed_fields() -> None:
    cross = GatedCrossNet((3, 2))
    mlp = MLP(cross.out_shape, hidden=(5,))
    x = torch.randn(4, 3, 2)
    assert torch.equal(Stack(cross, mlp)(x), mlp(cross(x)))


@pytest.mark.parametrize(
    ("make", "message"), [(lambda: GatedCrossNet((2, 4), num_layers=0), "at least one layer, got num_layers=0")]
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
