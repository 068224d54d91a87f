"""AutoInt against the paper's equations, hand-computed numbers, published parameter counts and planted data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.metrics import auc
from ctrlib.towers.autoint import AutoInt, InteractingLayer
from ctrlib.towers.combine import Parallel
from ctrlib.towers.fm import FM
from ctrlib.towers.mlp import MLP

PAPER: dict[str, Any] = {}
TENSORFLOW: dict[str, Any] = {"scale": True, "bias": True, "activation": True, "norm_after_relu": True}
FUXICTR: dict[str, Any] = {"scale": True, "identity": True, "norm_before_relu": True}
VARIANTS = {
    "paper": PAPER,
    "tensorflow": TENSORFLOW,
    "fuxictr": FUXICTR,
    "fuxictr_frappe": {"identity": True, "num_heads": 4},
    "no_residual": {"residual": False},
    "five_heads": {"num_heads": 5, "head_dim": 3},
}


def matrices(layer: InteractingLayer) -> list[nn.Linear]:
    """W_Q, W_K, W_V and, where the residual is projected, W_Res."""
    return [layer.query, layer.key, layer.value, *([] if layer.res is None else [layer.res])]


def set_matrices(layer: InteractingLayer, *weights: Tensor) -> None:
    for linear, weight in zip(matrices(layer), weights, strict=True):
        linear.weight.data.copy_(weight)


def by_hand(x: Tensor, layer: InteractingLayer, scale: bool, activation: bool, residual: bool) -> Tensor:
    """Equations 5 to 8, one example, head, field and neighbour at a time."""
    width = layer.num_heads * layer.head_dim
    out = torch.zeros(*x.shape[:2], width, dtype=x.dtype)
    parts = []
    for linear in matrices(layer):
        part = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        parts.append(part.clamp(min=0) if activation else part)
    for b in range(x.shape[0]):
        for h in range(layer.num_heads):
            cut = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            query, key, value = (part[b, :, cut] for part in parts[:3])
            for m in range(x.shape[1]):
                psi = [query[m].dot(key[k]) / (layer.head_dim**0.5 if scale else 1) for k in range(x.shape[1])]
                total = sum(torch.exp(p) for p in psi)
                for k in range(x.shape[1]):
                    out[b, m, cut] += torch.exp(psi[k]) / total * value[k]
    if residual:
        out = out + (parts[3] if len(parts) == 4 else x)
    out = normalised(out, layer.norm_before).clamp(min=0)
    return normalised(out, layer.norm_after)


def normalised(x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    if norm is None:
        return x
    variance = x.var(2, unbiased=False, keepdim=True)
    return (x - x.mean(2, keepdim=True)) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def randomised(tower: nn.Module, std: float = 0.4) -> nn.Module:
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=std)
    return tower.double()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_fields", [3, 10])
def test_follows_equations_5_to_8(name: str, num_fields: int) -> None:
    torch.manual_seed(0)
    options = {"num_heads": 4, "head_dim": 4, **VARIANTS[name]}
    tower = AutoInt((num_fields, 6), num_layers=3, **options)
    randomised(tower)
    x = torch.randn(2, num_fields, 6, dtype=torch.float64)
    expected = x
    for layer in tower.layers:
        assert isinstance(layer, InteractingLayer)
        expected = by_hand(
            expected,
            layer,
            options.get("scale", False),
            options.get("activation", False),
            options.get("residual", True),
        )
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(tower(x), expected.flatten(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("num_fields", "num_heads", "at_once"), [(10, 4, 4), (10, 8, 4), (39, 2, 1), (24, 6, 2), (49, 1, 1)]
)
def test_heads_computed_together_are_the_heads_computed_alone(num_fields: int, num_heads: int, at_once: int) -> None:
    torch.manual_seed(0)
    layer = randomised(InteractingLayer((num_fields, 6), num_heads=num_heads, head_dim=5))
    assert isinstance(layer, InteractingLayer)
    assert layer.heads_at_once == at_once
    x = torch.randn(3, num_fields, 6, dtype=torch.float64)
    out = layer(x)
    for head in range(num_heads):
        alone = InteractingLayer((num_fields, 6), num_heads=1, head_dim=5).double()
        cut = slice(head * 5, (head + 1) * 5)
        set_matrices(alone, *(linear.weight[cut] for linear in matrices(layer)))
        torch.testing.assert_close(out[:, :, cut], alone(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # E = [[1, 0], [0, 2]], all W = I, one head: A = softmax(E E^T) = softmax([[1, 0], [0, 4]]), ReLU(A E + E).
        (False, [[1.731059, 0.537883], [0.017986, 3.964028]]),
        (True, [[1.669762, 0.660477], [0.055807, 3.888386]]),
    ],
)
@pytest.mark.parametrize("identity", [False, True])
def test_hand_computed_layer(scale: bool, expected: list[list[float]], identity: bool) -> None:
    layer = InteractingLayer((2, 2), num_heads=1, head_dim=2, scale=scale, identity=identity)
    set_matrices(layer, *[torch.eye(2)] * (3 if identity else 4))
    out = layer(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))[0]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=6e-7)


@pytest.mark.parametrize("num_fields", [4, 30])
def test_attention_weights_sum_to_one_over_the_keys(num_fields: int) -> None:
    torch.manual_seed(0)
    layer = randomised(InteractingLayer((num_fields, 6), num_heads=3, head_dim=4, bias=True, residual=False))
    assert isinstance(layer, InteractingLayer)
    nn.init.zeros_(layer.value.weight)
    nn.init.ones_(layer.value.bias)  # every value is 1: what comes out is the sum of the weights
    x = torch.randn(5, num_fields, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.ones(5, num_fields, 12, dtype=torch.float64))
    # Values that are the fields' positions: the mean position differs from example to example.
    nn.init.zeros_(layer.value.bias)
    layer.value.weight.data[:, 0] = 1
    x[:, :, 0] = torch.arange(num_fields, dtype=torch.float64)
    means = layer(x)
    assert ((means > 0) & (means < num_fields - 1)).all()
    assert (means[0] - means[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_fields_may_be_permuted(name: str) -> None:
    torch.manual_seed(0)
    options = {"num_heads": 2, "head_dim": 8, **VARIANTS[name]}
    tower = AutoInt((7, 6), **options)
    width = options["num_heads"] * options["head_dim"]
    x, order = torch.randn(4, 7, 6), torch.randperm(7)
    torch.testing.assert_close(
        tower(x[:, order]).view(4, 7, width), tower(x).view(4, 7, width)[:, order], atol=1e-6, rtol=1e-5
    )


def test_a_zero_field_takes_part_with_score_zero() -> None:
    # A numeric feature of value 0 is the zero vector: not masked, its key gives score 0 and its value adds nothing.
    torch.manual_seed(0)
    layer = InteractingLayer((3, 4), num_heads=1, head_dim=4, residual=False).double()
    eye = torch.eye(4, dtype=torch.float64)
    set_matrices(layer, eye, eye, eye)
    x = torch.rand(1, 3, 4, dtype=torch.float64)
    x[0, 2] = 0
    a, b, _ = x[0]
    powers = [torch.exp(a.dot(a)), torch.exp(a.dot(b)), torch.ones((), dtype=torch.float64)]
    torch.testing.assert_close(layer(x)[0, 0], (powers[0] * a + powers[1] * b) / (powers[0] + powers[1] + powers[2]))
    torch.testing.assert_close(layer(x)[0, 2], (a + b) / 3)  # its own query is 0: uniform weights


def test_without_values_only_the_residual_is_left() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    projected = InteractingLayer((5, 8), num_heads=2, head_dim=4)
    query, key, _, residual = (linear.weight.clone() for linear in matrices(projected))
    set_matrices(projected, query, key, torch.zeros(8, 8), residual)
    torch.testing.assert_close(projected(x), torch.relu(x @ residual.T))
    identity = InteractingLayer((5, 8), num_heads=2, head_dim=4, identity=True)
    set_matrices(identity, query, key, torch.zeros(8, 8))
    torch.testing.assert_close(identity(x), torch.relu(x))
    none = InteractingLayer((5, 8), num_heads=2, head_dim=4, residual=False)
    set_matrices(none, query, key, torch.zeros(8, 8))
    assert not none(x).any()


def test_scaled_scores_are_unscaled_scores_of_smaller_queries() -> None:
    torch.manual_seed(0)
    scaled = InteractingLayer((5, 8), num_heads=2, head_dim=9, scale=True)
    plain = InteractingLayer((5, 8), num_heads=2, head_dim=9)
    query, key, value, residual = (linear.weight.clone() for linear in matrices(scaled))
    set_matrices(plain, query / 3, key, value, residual)
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(scaled(x), plain(x), rtol=1e-5, atol=1e-6)
    # Field embeddings are x_m v_m: with uniform attention the layer is linear in the scale of its input.
    set_matrices(plain, torch.zeros(18, 8), key, value, residual)
    torch.testing.assert_close(plain(3 * x), 3 * plain(x), rtol=1e-5, atol=1e-5)


def test_extreme_scores_stay_finite() -> None:
    tower = AutoInt((4, 8), num_heads=2)
    x = (1e4 * torch.randn(3, 4, 8)).requires_grad_()
    out = tower(x)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def count(*parts: nn.Module) -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def test_paper_parameters_for_criteo() -> None:
    tower = AutoInt((39, 16), num_layers=3, num_heads=2, head_dim=32)
    # 4 x 16 x 64 + 2 x (4 x 64 x 64) + (39 x 64 + 1); the paper says 3.9e4.
    assert count(tower, LinearHead(tower.out_shape)) == 39_361


@pytest.mark.parametrize(
    ("num_fields", "num_layers", "norm", "plus", "published", "outside"),
    [
        # Outside: embedding rows x 10, and x 1 more for the wide part (without a bias) of the MovieLens models.
        (3, 2, True, False, 1_047_798, 90_239 * 11),
        (10, 6, False, False, 306_051, 5_389 * 10),
        (3, 2, True, True, 1_383_799, 90_239 * 11),
        (10, 5, True, True, 622_180, 5_389 * 10),
    ],
)
def test_bars_parameter_counts(
    num_fields: int, num_layers: int, norm: bool, plus: bool, published: int, outside: int
) -> None:
    shape = (num_fields, 10)
    autoint = AutoInt(
        shape, num_layers=num_layers, num_heads=4, head_dim=32, scale=norm, identity=True, norm_before_relu=norm
    )
    tower: nn.Module = Parallel(autoint, MLP(shape, hidden=(400, 400, 400), batch_norm=True)) if plus else autoint
    # FuxiCTR's AutoInt+ adds two logits, each with a bias; LinearHead has one.
    assert count(tower, LinearHead(tower.out_shape)) == published - outside - (1 if plus else 0)


def test_every_matrix_starts_xavier_normal() -> None:
    torch.manual_seed(0)
    layer = InteractingLayer((3, 100), num_heads=4, head_dim=75, bias=True)
    for linear in matrices(layer):
        weight = linear.weight
        assert weight.std().item() == pytest.approx((2 / (100 + 300)) ** 0.5, rel=0.02)
        assert abs(weight.mean().item()) < 0.002
        assert not linear.bias.any()


def test_dropout_is_of_the_attention_weights() -> None:
    torch.manual_seed(0)
    layer = InteractingLayer((4, 6), num_heads=2, head_dim=3, dropout=0.5)
    # No pre-activation here is negative, so that the mean over masks is what evaluation computes.
    set_matrices(layer, torch.rand(6, 6), torch.rand(6, 6), torch.rand(6, 6), torch.zeros(6, 6))
    x = torch.rand(1, 4, 6)
    many = layer(x.expand(20_000, 4, 6))
    torch.testing.assert_close(many.mean(0), layer.eval()(x)[0], rtol=0.03, atol=0)
    assert many.std(0).min() > 0.1


def with_dropout(options: dict[str, Any]) -> Callable[[tuple[int, int]], AutoInt]:
    return lambda shape: AutoInt(shape, dropout=0.2, **options)


# The others are the default, or differ from it in a number only.
test_variants = conforms(
    {name: with_dropout(VARIANTS[name]) for name in ("tensorflow", "fuxictr", "no_residual", "five_heads")}
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "at least one interacting layer"),
        ({"num_heads": 0}, "num_heads=0 and head_dim=32"),
        ({"head_dim": 0}, "num_heads=2 and head_dim=0"),
        ({"residual": False, "identity": True}, "residual=False adds none"),
        ({"norm_before_relu": True, "norm_after_relu": True}, "choose one"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_wrong_use_says_how_to_fix_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoInt((3, 4), **options)


class Net(nn.Module):
    """Embeddings, a tower and one logit, small enough to train in a test."""

    def __init__(self, num_fields: int, num_ids: int, tower: nn.Module | None, unweighted: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_fields * num_ids, 8)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.register_buffer("first", torch.arange(num_fields) * num_ids)
        self.tower = tower or nn.Flatten()
        self.head = LinearHead((num_fields * 8,) if tower is None else tower.out_shape, unweighted=unweighted)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tower(self.embedding(ids + self.first)))[:, 0]
        return logits


def fit(net: Net, ids: Tensor, labels: Tensor, epochs: int) -> Net:
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(ids)).split(500):
            loss = nn.functional.binary_cross_entropy_with_logits(net(ids[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def evaluate(net: nn.Module, ids: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return auc(labels.numpy(), net(ids).numpy())


def sample(
    num_rows: int, num_fields: int, num_ids: int, sign: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, num_ids, (num_rows, num_fields))
    logits = 1.5 * sign(ids).float()
    return ids, torch.bernoulli(torch.sigmoid(logits)), logits


def test_finds_a_planted_sign_table() -> None:
    torch.manual_seed(0)
    # Balanced and circulant: 8 of 16 entries in every row and column are +1, so neither field says anything alone.
    pattern = torch.where(torch.randperm(16) < 8, 1, -1)

    def sign(ids: Tensor) -> Tensor:
        return pattern[(ids[:, 0] - ids[:, 1]) % 16]

    ids, labels, _ = sample(20_000, 4, 16, sign)
    test_ids, test_labels, logits = sample(20_000, 4, 16, sign)
    bayes = auc(test_labels.numpy(), logits.numpy())
    assert 0.80 < bayes < 0.83
    linear = fit(Net(4, 16, None), ids, labels, 2)
    assert 0.47 < evaluate(linear, test_ids, test_labels) < 0.53
    tower = AutoInt((4, 8), num_layers=2, num_heads=2, head_dim=16)
    assert evaluate(fit(Net(4, 16, tower), ids, labels, 7), test_ids, test_labels) > bayes - 0.01


def test_finds_a_parity_of_three_fields() -> None:
    torch.manual_seed(0)

    def sign(ids: Tensor) -> Tensor:
        return (1 - 2 * (ids[:, :3] % 2)).prod(1)

    ids, labels, _ = sample(20_000, 4, 8, sign)
    test_ids, test_labels, logits = sample(20_000, 4, 8, sign)
    bayes = auc(test_labels.numpy(), logits.numpy())
    assert 0.80 < bayes < 0.83
    pairs = fit(Net(4, 8, FM((4, 8)), unweighted=1), ids, labels, 3)
    assert evaluate(pairs, test_ids, test_labels) < 0.53
    tower = AutoInt((4, 8), num_layers=2, num_heads=2, head_dim=16)
    assert evaluate(fit(Net(4, 8, tower), ids, labels, 4), test_ids, test_labels) > bayes - 0.01
