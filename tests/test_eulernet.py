"""EulerNet against complex arithmetic, Euler's formula, parameter counts of published logs and planted data."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.metrics import auc
from ctrlib.towers.eulernet import EulerLayer, EulerNet
from ctrlib.towers.fm import FM

VARIANTS: dict[str, dict[str, Any]] = {
    "one_layer": {"num_orders": (7,)},
    "norm": {"num_orders": (7,), "layer_norm": True},
    "three_layers": {"num_orders": (4, 4, 6)},
    "as_many_as_fields": {"num_orders": (5, 5), "layer_norm": True},
}


def by_hand(z: list[list[complex]], layer: EulerLayer) -> list[list[complex]]:
    """One example: powers and products of complex numbers, and the linear layer beside them."""
    exponents, dim = layer.exponents, len(z[0])
    out = []
    for k in range(exponents.shape[0]):
        row = []
        for d in range(dim):
            product = cmath.exp(complex(layer.modulus_bias[k, d].item(), layer.phase_bias[k, d].item()))
            for j, vector in enumerate(z):
                # The principal power of the number with its modulus raised by epsilon, as in the code.
                modulus, phase = math.sqrt(abs(vector[d]) ** 2 + 1e-8), cmath.phase(vector[d])
                product *= cmath.rect(modulus, phase) ** exponents[k, j].item()
            weight = layer.implicit.weight[k * dim + d].tolist()
            flat = [number for vector in z for number in vector]
            bias = layer.implicit.bias[k * dim + d].item()
            real = max(0.0, bias + sum(w * number.real for w, number in zip(weight, flat, strict=True)))
            imag = max(0.0, bias + sum(w * number.imag for w, number in zip(weight, flat, strict=True)))
            row.append(product + complex(real, imag))
        out.append(row)
    if isinstance(layer.real_norm, nn.LayerNorm):
        reals = [normalised([number.real for number in row], layer.real_norm) for row in out]
        imags = [normalised([number.imag for number in row], layer.imag_norm) for row in out]
        out = [[complex(r, p) for r, p in zip(*pair, strict=True)] for pair in zip(reals, imags, strict=True)]
    return out


def normalised(row: list[float], norm: nn.Module) -> list[float]:
    assert isinstance(norm, nn.LayerNorm)
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
    return [(x - mean) / deviation * norm.weight[d].item() + norm.bias[d].item() for d, x in enumerate(row)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_is_arithmetic_of_complex_numbers(name: str, sign: int) -> None:
    torch.manual_seed(0)
    tower = EulerNet((5, 3), **VARIANTS[name]).double()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.5)
    tower.mu.data = sign * (0.5 + torch.rand(5, 1, dtype=torch.float64))
    x = 3 * torch.randn(4, 5, 3, dtype=torch.float64)
    assert (x.abs() > math.pi).any()  # phases beyond the principal branch
    for row, out in zip(x, tower(x), strict=True):
        z = [[tower.mu[j].item() * cmath.exp(1j * e.item()) for e in vector] for j, vector in enumerate(row)]
        for layer in tower.layers:
            assert isinstance(layer, EulerLayer)
            z = by_hand(z, layer)
        expected = torch.tensor([number.real + number.imag for vector in z for number in vector], dtype=torch.float64)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def explicit_only(num_fields: int, exponents: list[list[float]]) -> EulerNet:
    tower = EulerNet((num_fields, 1), num_orders=(len(exponents),)).double()
    (layer,) = tower.layers
    assert isinstance(layer, EulerLayer)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    layer.exponents.data = torch.tensor(exponents, dtype=torch.float64)
    return tower


def test_exponents_are_orders() -> None:
    tower = explicit_only(3, [[1, 1, 0], [0, 0, 2], [1, -1, 0], [0, 0, 0]])
    a, b, c = 0.3, 0.5, 0.7
    angles = torch.tensor([a + b, 2 * c, a - b, 0.0], dtype=torch.float64)  # product, square, quotient, nothing
    x = torch.tensor([[[a], [b], [c]]], dtype=torch.float64)
    torch.testing.assert_close(tower(x)[0], angles.cos() + angles.sin(), rtol=0, atol=1e-7)
    # With moduli 2, 3 and 5: 2 x 3, 5^2, 2 / 3 and 1.
    tower.mu.data = torch.tensor([[2.0], [3.0], [5.0]], dtype=torch.float64)
    moduli = torch.tensor([6.0, 25.0, 2 / 3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(tower(x)[0], moduli * (angles.cos() + angles.sin()), rtol=1e-7, atol=0)


def test_hand_computed_values() -> None:
    # e = pi / 3 and pi / 6: their product is i, real + imaginary part 1; the root of exp(i 4) has phase (4 - 2 pi) / 2.
    x = torch.tensor([[[math.pi / 3], [math.pi / 6]]], dtype=torch.float64)
    assert explicit_only(2, [[1, 1]])(x).item() == pytest.approx(1.0, abs=1e-7)
    half = explicit_only(2, [[0.5, 0]])
    x = torch.tensor([[[4.0], [0.0]]], dtype=torch.float64)
    assert half(x).item() == pytest.approx(math.cos(2 - math.pi) + math.sin(2 - math.pi), abs=1e-7)
    # A negative mu turns the number round: -4 exp(0.2 i) has modulus 4 and phase 0.2 - pi.
    half.mu.data.fill_(-4.0)
    root = 2 * cmath.exp(0.5j * (0.2 - math.pi))
    assert half(torch.full((1, 2, 1), 0.2, dtype=torch.float64)).item() == pytest.approx(
        root.real + root.imag, abs=1e-6
    )


def test_starts_with_the_fields_themselves() -> None:
    torch.manual_seed(0)
    same = EulerNet((5, 3), num_orders=(5,)).layers[0]
    assert isinstance(same, EulerLayer)
    assert torch.equal(same.exponents, torch.eye(5))
    other = EulerNet((5, 3), num_orders=(300,)).layers[0]
    assert isinstance(other, EulerLayer)
    torch.testing.assert_close(other.exponents.sum(1), torch.ones(300))  # each order vector picks one field
    assert other.exponents.max(1).values.mean() > 0.97
    assert other.exponents.mean(0).min() > 0.1  # and every field is picked
    assert other.implicit.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (15 + 900)), rel=0.01)


def test_order_of_the_fields_is_that_of_the_exponents() -> None:
    torch.manual_seed(0)
    tower = EulerNet((5, 3), num_orders=(4,))
    x, order = torch.randn(6, 5, 3), torch.randperm(5)
    expected = tower(x)
    (layer,) = tower.layers
    assert isinstance(layer, EulerLayer)
    layer.exponents.data = layer.exponents[:, order]
    layer.implicit.weight.data = layer.implicit.weight.view(12, 5, 3)[:, order].flatten(1)
    torch.testing.assert_close(tower(x[:, order]), expected, rtol=1e-5, atol=1e-5)


def test_phases_are_periodic() -> None:
    torch.manual_seed(0)
    tower = EulerNet((5, 3), num_orders=(4, 4)).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(tower(x + 2 * math.pi), tower(x))


def test_gradient() -> None:
    torch.manual_seed(0)
    tower = EulerNet((3, 2), num_orders=(4, 2), layer_norm=True).double()
    assert torch.autograd.gradcheck(tower, (torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True),))


def count(*parts: nn.Module) -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


@pytest.mark.parametrize(
    ("shape", "num_orders", "layer_norm", "published", "embedding"),
    [
        ((3, 10), (52,), True, 920_520, 90_242 * 10),
        ((10, 10), (52,), True, 108_889, 5_399 * 10),
        ((22, 10), (40, 40, 40), False, 13_403_321, 1_298_621 * 10),
        ((39, 16), (39, 39), True, 15_358_906, 910_747 * 16),
    ],
    ids=["movielens_latest", "frappe", "avazu", "criteo"],
)
def test_published_parameter_counts(
    shape: tuple[int, int], num_orders: tuple[int, ...], layer_norm: bool, published: int, embedding: int
) -> None:
    tower = EulerNet(shape, num_orders=num_orders, layer_norm=layer_norm)
    # The logged code also held, unused, four batch normalisations a layer, two over its inputs and two over its
    # outputs, and without layer_norm two layer normalisations all the same.
    pairs = itertools.pairwise([shape[0], *num_orders])
    unused = sum(2 * 2 * (before + after) + (0 if layer_norm else 2 * 2 * shape[1]) for before, after in pairs)
    assert count(tower, LinearHead(tower.out_shape)) == published - embedding - unused


def test_logit_is_that_of_the_codes() -> None:
    # There: reg(real) + reg(imaginary), one layer for both.
    torch.manual_seed(0)
    tower = EulerNet((4, 3), num_orders=(4,))
    head = LinearHead(tower.out_shape)
    x = torch.randn(5, 4, 3)
    (layer,) = tower.layers
    real, imag = layer(x.cos(), x.sin(), torch.zeros(1, 4, 3))
    assert head.linear is not None
    reg = nn.Linear(12, 1)
    reg.weight = head.linear.weight
    head.bias.data = 2 * reg.bias.detach()
    torch.testing.assert_close(head(tower(x)), reg(real.flatten(1)) + reg(imag.flatten(1)))


def test_dropout_of_moduli_phases_and_implicit_inputs() -> None:
    torch.manual_seed(0)
    tower = explicit_only(1, [[1.0]])
    tower.mu.data.fill_(3.0)
    (layer,) = tower.layers
    assert isinstance(layer, EulerLayer)
    x = torch.full((4000, 1, 1), 0.4, dtype=torch.float64)
    torch.testing.assert_close(tower(x[:1]).item(), 3 * (math.cos(0.4) + math.sin(0.4)), rtol=0, atol=1e-6)
    layer.explicit_dropout.__init__(0.5)  # type: ignore[misc]
    # A kept number is doubled, a dropped one 0: modulus 1 or 9, phase 0 or 0.8, one as often as the other.
    expected = sorted(m * (math.cos(t) + math.sin(t)) for m in (1, 9) for t in (0, 0.8))
    values, counts = tower(x)[:, 0].mul(1e4).round().div(1e4).unique(return_counts=True)
    assert values.tolist() == pytest.approx(expected, abs=1e-3)
    assert counts.min() > 800
    layer.explicit_dropout.__init__(0.0)  # type: ignore[misc]
    layer.implicit_dropout.__init__(0.5)  # type: ignore[misc]
    nn.init.zeros_(layer.exponents)
    nn.init.ones_(layer.implicit.weight)  # explicit part: 1; implicit one: the inputs, doubled or 0
    r, p = 6 * math.cos(0.4), 6 * math.sin(0.4)
    values, counts = tower(x)[:, 0].mul(1e4).round().div(1e4).unique(return_counts=True)
    assert values.tolist() == pytest.approx(sorted((1, 1 + p, 1 + r, 1 + r + p)), abs=1e-3)
    assert counts.min() > 800


def with_dropout(options: dict[str, Any]) -> Callable[[tuple[int, int]], EulerNet]:
    return lambda shape: EulerNet(shape, explicit_dropout=0.2, implicit_dropout=0.2, **options)


test_variants = conforms({name: with_dropout(VARIANTS[name]) for name in ("three_layers", "as_many_as_fields")})


@pytest.mark.parametrize("num_orders", [(), (3, 0)])
def test_wrong_use_says_how_to_fix_it(num_orders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="num_orders must be one or more positive integers, got"):
        EulerNet((3, 4), num_orders=num_orders)


class Net(nn.Module):
    """Embeddings, a tower and one logit, small enough to train in a test."""

    def __init__(self, num_fields: int, num_ids: int, tower: EulerNet | FM, unweighted: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_fields * num_ids, 8)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.first = torch.arange(num_fields) * num_ids
        self.tower = tower
        self.head = LinearHead(tower.out_shape, unweighted=unweighted)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tower(self.embedding(ids + self.first)))[:, 0]
        return logits


def fitted_auc(net: Net, sign: Callable[[Tensor], Tensor], num_ids: int, epochs: int) -> tuple[float, float]:
    """Test AUC of the fitted net, and the Bayes AUC, where the true logit is 1.5 x sign."""
    num_fields = len(net.first)
    ids = torch.randint(0, num_ids, (40_000, num_fields))
    logits = 1.5 * sign(ids).float()
    labels = torch.bernoulli(logits.sigmoid())
    train = slice(0, 20_000)
    test = slice(20_000, None)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(20_000).split(500):
            loss = nn.functional.binary_cross_entropy_with_logits(net(ids[train][rows]), labels[train][rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        scores = net.eval()(ids[test])
    return auc(labels[test].numpy(), scores.numpy()), auc(labels[test].numpy(), logits[test].numpy())


def test_finds_a_planted_sign_table() -> None:
    torch.manual_seed(0)
    # Balanced and circulant: 8 of 16 entries in every row and column are +1, so neither field says anything alone.
    pattern = torch.where(torch.randperm(16) < 8, 1, -1)
    net = Net(4, 16, EulerNet((4, 8), num_orders=(16,), layer_norm=True))
    found, bayes = fitted_auc(net, lambda ids: pattern[(ids[:, 0] - ids[:, 1]) % 16], 16, 7)
    assert 0.80 < bayes < 0.83
    assert found > bayes - 0.01


def test_finds_a_parity_of_three_fields() -> None:
    def sign(ids: Tensor) -> Tensor:
        return (1 - 2 * (ids[:, :3] % 2)).prod(1)

    torch.manual_seed(0)
    pairs, bayes = fitted_auc(Net(4, 8, FM((4, 8)), unweighted=1), sign, 8, 3)
    assert 0.80 < bayes < 0.83
    assert pairs < 0.53
    found, bayes = fitted_auc(Net(4, 8, EulerNet((4, 8), num_orders=(16,), layer_norm=True)), sign, 8, 4)
    assert found > bayes - 0.01
