"""Encoders of numbers against their published equations, and what they can learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.embeddings.numeric import AutoDis, Bucketised, Periodic, PiecewiseLinear, ValueTimesVector
from ctrlib.metrics import auc
from ctrlib.models import MODELS, build
from ctrlib.schema import BINNED, Categorical, Numeric, NumericFields, Schema
from ctrlib.testing import example_batch, make_copy

EDGES = [[0.0, 1.0, 3.0], [-2.0, 5.0], [-1.0, -0.5, 0.25, 0.5, 4.0]]  # 2, 1 and 4 bins
N, D = len(EDGES), 6

ENCODERS: dict[str, Callable[[], Any]] = {
    "value_times_vector": lambda: ValueTimesVector(N, embedding_dim=D),
    "bucketised": lambda: Bucketised(EDGES, embedding_dim=D, init_std=0.5),
    "piecewise_linear": lambda: PiecewiseLinear(EDGES, embedding_dim=D),
    "piecewise_linear_relu": lambda: PiecewiseLinear(EDGES, embedding_dim=D, relu=True),
    "piecewise_linear_one_bin": lambda: PiecewiseLinear([[0.0, 2.0]] * N, embedding_dim=D),
    "periodic": lambda: Periodic(N, embedding_dim=D, num_frequencies=5, sigma=0.7),
    "periodic_lite": lambda: Periodic(N, embedding_dim=D, num_frequencies=5, sigma=0.7, lite=True),
    "periodic_linear": lambda: Periodic(N, embedding_dim=D, num_frequencies=5, sigma=0.7, relu=False),
    "autodis": lambda: AutoDis(N, embedding_dim=D, num_meta_embeddings=7, alpha=0.3, temperature=0.5),
}


def numbers(num_rows: int = 40) -> Tensor:
    """Random numbers, and rows that lie exactly on the edges, or far outside."""
    torch.manual_seed(1)
    on_edges = torch.tensor([[edges[min(i, len(edges) - 1)] for edges in EDGES] for i in range(5)])
    return torch.cat([2 * torch.randn(num_rows, N), on_edges, torch.tensor([[-50.0] * N, [70.0] * N, [0.0] * N])])


def numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().numpy()


# ------------------------------------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_keeps_the_contract(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    assert (encoder.in_shape, encoder.out_shape) == ((N,), (N, D))
    x = numbers().requires_grad_()
    fields = encoder(x)
    assert fields.shape == (len(x), N, D)
    assert fields.is_contiguous()
    assert fields.dtype == torch.float32
    for row in (0, 41, 46):
        torch.testing.assert_close(encoder(x[row : row + 1]), fields[row : row + 1])
    torch.testing.assert_close(encoder(x.flip(0)), fields.flip(0))
    torch.testing.assert_close(make_copy(encoder)(x), fields)
    moved = x.detach().clone()
    moved[:, 1] += 9
    assert torch.equal((encoder(moved) != fields).any(2).any(0), torch.tensor([False, True, False]))
    torch.autograd.backward((fields * torch.randn_like(fields)).sum())
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).flatten(1).any(1).all()  # of every feature


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_can_be_traced_and_exported(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    x = numbers()
    traced = torch.fx.symbolic_trace(encoder)
    exported = torch.export.export(encoder, (x[:9],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    for batch in (x, x[:5]):
        torch.testing.assert_close(traced(batch), encoder(batch))
        torch.testing.assert_close(exported(batch), encoder(batch))


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS[name]().double()
    x = numbers(6)[:6].double()  # none on an edge
    names = [name for name, _ in encoder.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        fields: Tensor = torch.func.functional_call(encoder, dict(zip(names, values)), (x,))
        return fields

    assert torch.autograd.gradcheck(run, [p.detach().requires_grad_() for p in encoder.parameters()])
    if name != "bucketised":  # constant, with jumps
        assert torch.autograd.gradcheck(encoder, [x.requires_grad_()])


# ----------------------------------------------------------------------------------------------------------- equations


def ple(x: float, edges: list[float]) -> list[float]:
    """Equation 1 of Gorishniy et al., case by case."""
    num_bins = len(edges) - 1
    e = []
    for t in range(1, num_bins + 1):
        low, high = edges[t - 1], edges[t]
        if x < low and t > 1:
            e.append(0.0)
        elif x >= high and t < num_bins:
            e.append(1.0)
        else:
            e.append((x - low) / (high - low))
    return e


def test_hand_vectors_of_equation_1() -> None:
    assert [ple(x, [0.0, 1.0, 3.0]) for x in (2.0, -1.0, 5.0)] == [[1.0, 0.5], [-1.0, 0.0], [1.0, 2.0]]
    encoder = PiecewiseLinear([[0.0, 1.0, 3.0]], embedding_dim=1)
    for x, expected in (
        (2, [1, 0.5]),
        (-1, [-1, 0]),
        (5, [1, 2]),
        (0, [0, 0]),
        (1, [1, 0]),
        (3, [1, 1]),
        (0.5, [0.5, 0]),
    ):
        assert encoder.encode(torch.tensor([[float(x)]]))[0, 0].tolist() == expected


@pytest.mark.parametrize("relu", [False, True])
def test_piecewise_linear_is_equation_1_and_a_linear_layer(relu: bool) -> None:
    torch.manual_seed(0)
    encoder = PiecewiseLinear(EDGES, embedding_dim=D, relu=relu).double()
    x = numbers().double()
    weight, bias = numpy(encoder.weight), numpy(encoder.bias)
    expected = np.empty((len(x), N, D))
    for row, feature in np.ndindex(len(x), N):
        e = ple(x[row, feature].item(), EDGES[feature])
        value = np.array(e) @ weight[feature, : len(e)] + bias[feature, 0]
        expected[row, feature] = np.maximum(value, 0) if relu else value
    np.testing.assert_allclose(numpy(encoder(x)), expected, rtol=1e-12, atol=1e-12)


def test_piecewise_linear_is_continuous_at_the_edges() -> None:
    encoder = PiecewiseLinear(EDGES, embedding_dim=D).double()
    for edge in range(5):
        x = torch.tensor([[edges[min(edge, len(edges) - 1)] for edges in EDGES]], dtype=torch.float64)
        torch.testing.assert_close(encoder(x - 1e-9), encoder(x + 1e-9), rtol=0, atol=1e-7)


def test_piecewise_linear_starts_as_separate_linear_layers() -> None:
    torch.manual_seed(0)
    encoder = PiecewiseLinear([list(range(101)), list(range(26))], embedding_dim=64)
    for feature, num_bins in enumerate((100, 25)):
        like = nn.Linear(num_bins, 64)
        assert encoder.weight[feature, :num_bins].abs().max().item() == pytest.approx(num_bins**-0.5, rel=0.01)
        assert encoder.weight[feature, :num_bins].std().item() == pytest.approx(like.weight.std().item(), rel=0.1)
        assert encoder.bias[feature].abs().max() <= num_bins**-0.5


@pytest.mark.parametrize("make", [PiecewiseLinear, Bucketised])
def test_padding_is_and_stays_zero(make: Callable[..., Any]) -> None:
    encoder = make(EDGES, embedding_dim=D)
    num_own = [len(edges) - (make is PiecewiseLinear) for edges in EDGES]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        encoder(numbers()).square().sum().backward()
        optimizer.step()
    for weight, own in zip(encoder.weight, num_own):
        assert (weight[:own] != 0).all()
        assert (weight[own:] == 0).all()


def test_bucketised_is_a_look_up_by_bin() -> None:
    encoder = Bucketised(EDGES, embedding_dim=D, init_std=1.0).double()
    x = numbers().double()
    rows = set()
    for row, feature in np.ndindex(len(x), N):
        own = EDGES[feature]
        index = max(sum(edge <= x[row, feature].item() for edge in own) - 1, 0)
        rows.add((feature, index))
        torch.testing.assert_close(encoder(x[row : row + 1])[0, feature], encoder.weight[feature, index])
    assert rows == {(feature, index) for feature, own in enumerate(EDGES) for index in range(len(own))}


def test_bucketised_tells_two_values_apart_and_keeps_to_its_rows() -> None:
    torch.manual_seed(0)
    encoder = Bucketised([[0.0, 1.0], [0.0, 1.0, 2.0]], embedding_dim=4)
    zero, one, beyond = encoder(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e30, 1e30]]))
    assert not torch.allclose(zero, one, rtol=1e-3, atol=0)
    torch.testing.assert_close(beyond[0], one[0], rtol=0, atol=1e-9)
    assert encoder.weight.shape == (2, 3, 4)
    assert encoder.weight.abs().max() < 1e-3  # N(0, 1e-4^2), as tables start


@pytest.mark.parametrize(("lite", "relu"), [(False, True), (True, True), (False, False)])
def test_periodic_follows_its_formula(lite: bool, relu: bool) -> None:
    torch.manual_seed(0)
    encoder = Periodic(N, embedding_dim=D, num_frequencies=5, sigma=0.7, lite=lite, relu=relu).double()
    x = numbers().double()
    c, weight, bias = numpy(encoder.frequencies), numpy(encoder.weight), numpy(encoder.bias)
    assert weight.shape == (1 if lite else N, 10, D)
    expected = np.empty((len(x), N, D))
    for row, feature in np.ndindex(len(x), N):
        v = [2 * math.pi * c[feature, k] * x[row, feature].item() for k in range(5)]
        periodic = np.array([math.sin(angle) for angle in v] + [math.cos(angle) for angle in v])
        layer = 0 if lite else feature
        value = periodic @ weight[layer] + bias[layer, 0]
        expected[row, feature] = np.maximum(value, 0) if relu else value
    np.testing.assert_allclose(numpy(encoder(x)), expected, rtol=1e-10, atol=1e-10)


def test_periodic_starts_with_normal_frequencies() -> None:
    torch.manual_seed(0)
    frequencies = Periodic(200, num_frequencies=100, sigma=0.3).frequencies
    assert frequencies.std().item() == pytest.approx(0.3, rel=0.02)
    assert (frequencies.abs() > 0.9).double().mean().item() == pytest.approx(0.0027, abs=0.001)  # beyond 3 sigma, too


def test_autodis_follows_its_equations() -> None:
    torch.manual_seed(0)
    alpha, temperature, slope = 0.3, 0.5, 0.2
    encoder = AutoDis(
        N, embedding_dim=D, num_meta_embeddings=7, alpha=alpha, temperature=temperature, negative_slope=slope
    ).double()
    x = numbers().double()
    w, second, meta = numpy(encoder.first), numpy(encoder.second), numpy(encoder.meta_embeddings)
    expected = np.zeros((len(x), N, D))
    for row, feature in np.ndindex(len(x), N):
        h = [w[feature, 0, i] * x[row, feature].item() for i in range(7)]
        h = [value if value > 0 else slope * value for value in h]
        scores = [sum(second[feature, i, j] * h[j] for j in range(7)) + alpha * h[i] for i in range(7)]
        shares = np.exp((np.array(scores) - max(scores)) / temperature)
        shares /= shares.sum()
        for i in range(7):
            expected[row, feature] += shares[i] * meta[feature, i]
    np.testing.assert_allclose(numpy(encoder(x)), expected, rtol=1e-9, atol=1e-12)


def test_autodis_without_its_hidden_layer_is_the_authors_code() -> None:
    encoder = AutoDis(N, embedding_dim=D, num_meta_embeddings=7, alpha=1.0, temperature=0.5, negative_slope=1.0)
    encoder.second.data.zero_()
    x = numbers()
    shares = torch.softmax(x.unsqueeze(2) * encoder.first[:, 0] / 0.5, dim=2)
    torch.testing.assert_close(encoder(x), torch.einsum("bnh,nhd->bnd", shares, encoder.meta_embeddings))


def test_value_times_vector() -> None:
    torch.manual_seed(0)
    encoder = ValueTimesVector(300, embedding_dim=7)
    assert encoder.vectors.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.05)
    x = torch.randn(3, 300)
    torch.testing.assert_close(encoder(x), torch.einsum("bn,nd->bnd", x, encoder.vectors))


def test_numbers_of_parameters() -> None:
    def count(encoder: nn.Module) -> int:
        return sum(parameter.numel() for parameter in encoder.parameters())

    edges = [list(range(33))] * 13
    assert count(ValueTimesVector(13, embedding_dim=16)) == 13 * 16
    assert count(Bucketised(edges, embedding_dim=16)) == 13 * 33 * 16
    assert count(PiecewiseLinear(edges, embedding_dim=16)) == 13 * (32 + 1) * 16
    assert count(Periodic(13, embedding_dim=16, num_frequencies=48)) == 13 * (48 + (96 + 1) * 16)
    assert count(Periodic(13, embedding_dim=16, num_frequencies=48, lite=True)) == 13 * 48 + (96 + 1) * 16
    assert count(AutoDis(13, embedding_dim=16, num_meta_embeddings=20)) == 13 * (20 + 20 * 20 + 20 * 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bucketised([]), "one list per numeric feature, got none"),
        (lambda: Bucketised([[0.0, 1.0], [1.0]]), r"feature 1 must be two or more .* got \[1.0\]"),
        (lambda: PiecewiseLinear([[0.0, 0.0, 1.0]]), "feature 0 must be two or more finite numbers that increase"),
        (lambda: PiecewiseLinear([[1.0, 1.0 + 1e-12]]), "increase as float32"),
        (lambda: PiecewiseLinear([[0.0, math.inf]]), "finite"),
        (lambda: PiecewiseLinear([[0.0, math.nan, 1.0]]), "finite"),
        (lambda: PiecewiseLinear([[0.0, 1.0]], embedding_dim=0), "1 or more, got embedding_dim=0"),
        (lambda: ValueTimesVector(0), "1 or more, got num_features=0"),
        (lambda: Periodic(2, num_frequencies=0), "1 or more, got num_frequencies=0"),
        (lambda: Periodic(2, sigma=0.0), "sigma, the spread of the frequencies, must be positive, got 0.0"),
        (lambda: AutoDis(2, num_meta_embeddings=0), "1 or more, got num_meta_embeddings=0"),
        (lambda: AutoDis(2, temperature=0.0), "temperature must be positive, got 0.0"),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------------- planted


def fitted_auc(encoder: Any, lr: float = 0.02) -> tuple[float, float]:
    """Test AUC of a linear head on the sum of fields, and of the true logits, where these are a wave of a number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30_000, 2, generator=generator) * 2 - 1
    logits = 2.5 * torch.sin(6 * x[:, 0] + 1.2)
    y = (torch.rand(len(x), generator=generator) < logits.sigmoid()).float()
    head = nn.Linear(encoder.out_shape[1], 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=lr)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = lr * 0.3**epoch
        for rows in torch.split(torch.randperm(20_000, generator=generator), 250):
            loss = nn.functional.binary_cross_entropy_with_logits(head(encoder(x[rows]).sum(1))[:, 0], y[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        scores = head(encoder(x[20_000:]).sum(1))[:, 0]
    return auc(y[20_000:].numpy(), scores.numpy()), auc(y[20_000:].numpy(), logits[20_000:].numpy())


def uniform_edges() -> list[list[float]]:
    return [torch.linspace(-1, 1, 33).tolist()] * 2


def test_planted_wave_is_invisible_to_value_times_vector() -> None:
    torch.manual_seed(0)
    reached, possible = fitted_auc(ValueTimesVector(2, embedding_dim=8))
    assert possible > 0.85
    assert reached < 0.6


@pytest.mark.parametrize(
    "make",
    [
        lambda: PiecewiseLinear(uniform_edges(), embedding_dim=8),
        lambda: PiecewiseLinear(uniform_edges(), embedding_dim=8, relu=True),
        lambda: Bucketised(uniform_edges(), embedding_dim=8),
        lambda: Periodic(2, embedding_dim=8, num_frequencies=16, sigma=1.0),
        lambda: Periodic(2, embedding_dim=8, num_frequencies=16, sigma=1.0, lite=True),
        lambda: Periodic(2, embedding_dim=8, num_frequencies=16, sigma=1.0, relu=False),
    ],
)
def test_planted_wave_is_found(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    reached, possible = fitted_auc(make())
    assert reached > possible - 0.01


def test_autodis_sees_most_of_a_planted_wave_unless_its_temperature_is_low() -> None:
    torch.manual_seed(0)
    reached, possible = fitted_auc(AutoDis(2, embedding_dim=8))
    assert reached > possible - 0.03
    sharp = AutoDis(2, embedding_dim=8, temperature=1e-6)  # only the sign of the number is left
    x = torch.tensor([[0.2, -0.2], [0.7, -0.9]])
    torch.testing.assert_close(sharp(x)[0], sharp(x)[1])
    assert not torch.allclose(sharp(x), sharp(-x))


# ------------------------------------------------------------------------------------------------------- first logits

OF_FIELDS = [name for name, model in MODELS.items() if model.kind == "interaction"]


@pytest.mark.parametrize("model", OF_FIELDS)
@pytest.mark.parametrize("num_numbers", [1, 13, 60])
@pytest.mark.parametrize("numeric", get_args(NumericFields))
def test_no_model_starts_with_logits_that_must_be_unlearnt(numeric: str, num_numbers: int, model: str) -> None:
    torch.manual_seed(0)
    numbers = [Numeric(f"n{n}", parameters={}) for n in range(num_numbers)]
    schema = Schema((*numbers, *(Categorical(f"c{n}", num_embeddings=12) for n in range(3))), ("label",))
    config: dict[str, Any] = {"model": model, "numeric": numeric}
    if numeric in BINNED:
        config["edges"] = [torch.linspace(-2, 2, 33).tolist()] * num_numbers
    with torch.no_grad():
        logits = build(config, schema)(example_batch(schema, 512))
    # EulerNet begins at any constant, as its authors have it: all moduli are 1.
    assert logits.mean().abs() < (6 if model == "eulernet" else 3), logits.mean()
    assert logits.std() < 2, logits.std()
