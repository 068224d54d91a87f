"""FGCNN against its equations in loops, the heights of its specification, and BARS' parameter count on KKBox."""

from __future__ import annotations

import math

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Stack
from ctrlib.towers.fgcnn import FGCNN
from ctrlib.towers.ipnn import IPNN
from ctrlib.towers.mlp import MLP


def new_fields(tower: FGCNN, x: Tensor, *, pooling_size: int, round_up: bool) -> Tensor:
    """R^1, .., R^n in the paper's order (tanh, then pooling), one number at a time; without batch normalisation."""
    batch, _, dim = x.shape
    state, made = x.unsqueeze(1), []
    for convolution, recombination in zip(tower.convolutions, tower.recombinations, strict=True):
        kernel, bias = convolution[0].weight, convolution[0].bias
        channels, before, taps, _ = kernel.shape
        height = state.shape[2]
        mapped = bias.view(1, -1, 1, 1).expand(batch, channels, height, dim).clone()
        for field in range(height):
            for tap in range(taps):
                neighbour = field + tap - taps // 2
                if 0 <= neighbour < height:
                    for channel in range(before):
                        mapped[:, :, field] += (
                            kernel[:, channel, tap].view(1, -1, 1) * state[:, None, channel, neighbour]
                        )
        mapped = mapped.tanh()
        steps = math.ceil(height / pooling_size) if round_up else height // pooling_size
        state = torch.stack(
            [mapped[:, :, step * pooling_size : (step + 1) * pooling_size].amax(2) for step in range(steps)], dim=2
        )
        made.append(torch.tanh(state.flatten(1) @ recombination.weight.T + recombination.bias).view(batch, -1, dim))
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("num_raw", [None, 3])
@pytest.mark.parametrize(("pooling_size", "round_up"), [(2, True), (2, False), (3, True), (3, False), (1, True)])
def test_outputs_and_gradients_follow_the_equations(num_raw: int | None, pooling_size: int, round_up: bool) -> None:
    torch.manual_seed(0)
    num_fields = 7 + (num_raw or 0)
    tower = FGCNN(
        (num_fields, 3),
        num_raw=num_raw,
        num_channels=(2, 3) if pooling_size < 3 else (2,),
        kernel_height=3,
        pooling_size=pooling_size,
        num_new=2,
        batch_norm=False,
        round_up=round_up,
    ).double()
    x = torch.randn(4, num_fields, 3, dtype=torch.float64, requires_grad=True)
    raw, own = (x, x) if num_raw is None else (x[:, :num_raw], x[:, num_raw:])
    expected = torch.cat([raw, new_fields(tower, own, pooling_size=pooling_size, round_up=round_up)], dim=1)
    got = tower(x)
    assert got.shape[1:] == tower.out_shape
    torch.testing.assert_close(got, expected)
    direction, inputs = torch.randn_like(expected), [x, *tower.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )


def test_batch_normalisation_stands_between_convolution_and_tanh() -> None:
    torch.manual_seed(0)
    tower = FGCNN((4, 3), num_channels=(2,), kernel_height=3, num_new=1).double()
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    mapped = tower.convolutions[0][0](x.unsqueeze(1))
    mean, variance = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), unbiased=False, keepdim=True)
    mapped = torch.tanh((mapped - mean) / (variance + 1e-5).sqrt())
    pooled = torch.maximum(mapped[:, :, 0::2], mapped[:, :, 1::2])
    expected = torch.tanh(tower.recombinations[0](pooled.flatten(1))).view(6, 2, 3)
    torch.testing.assert_close(tower(x), torch.cat([x, expected], dim=1))


@pytest.mark.parametrize(
    ("num_fields", "round_up", "heights", "num_out"),
    [
        (39, True, (20, 10, 5, 3), 153),
        (24, True, (12, 6, 3, 2), 93),
        (13, True, (7, 4, 2, 1), 55),
        (10, True, (5, 3, 2, 1), 43),
        (3, True, (2, 1, 1, 1), 18),
        (39, False, (19, 9, 4, 2), 141),
        (24, False, (12, 6, 3, 1), 90),
    ],
)
def test_heights(num_fields: int, round_up: bool, heights: tuple[int, ...], num_out: int) -> None:
    tower = FGCNN((num_fields, 2), round_up=round_up)
    assert tower.out_shape == (num_out, 2)
    assert tuple(layer.out_features // (3 * 2) for layer in tower.recombinations) == heights
    assert tower.eval()(torch.randn(2, num_fields, 2)).shape == (2, num_out, 2)


@pytest.mark.parametrize(("num_fields", "layers", "num_out"), [(13, 3, 43), (10, 3, 34), (3, 1, 6)])
def test_rounding_down_can_leave_nothing_to_pool(num_fields: int, layers: int, num_out: int) -> None:
    with pytest.raises(ValueError, match=rf"leaves none of the 1 fields before layer {layers + 1}.*round_up=True"):
        FGCNN((num_fields, 2), round_up=False)
    # As many layers as the message allows.
    channels = (14, 16, 18)[:layers]
    assert FGCNN((num_fields, 2), num_channels=channels, round_up=False).out_shape == (num_out, 2)


def test_published_parameter_count_on_kkbox() -> None:
    """Two tables of 92,247 rows a field set, embeddings of width 128, no batch normalisation in the MLP."""
    fgcnn = FGCNN((2 * 13, 128), num_raw=13)
    assert fgcnn.out_shape == (55, 128)
    products = IPNN(fgcnn.out_shape)
    tower = Stack(fgcnn, products, MLP(products.out_shape, hidden=(1000, 1000, 1000)))
    network = sum(parameter.numel() for part in (tower, LinearHead(tower.out_shape)) for parameter in part.parameters())
    assert network == 61_363_951
    assert network + 2 * 92_247 * 128 == 84_979_183


def test_padding_never_wins_the_maximum() -> None:
    """Odd height and all activations negative: zeros as padding would be larger."""
    tower = FGCNN((3, 2), num_channels=(1,), kernel_height=1, num_new=1, batch_norm=False)
    with torch.no_grad():
        tower.convolutions[0][0].weight.fill_(1)
        tower.convolutions[0][0].bias.zero_()
        tower.recombinations[0].weight.copy_(torch.eye(4))
    x = -torch.tensor([[[1.0, 2.0], [0.5, 3.0], [0.7, 0.2]]])
    pooled = torch.tensor([[[-0.5, -2.0], [-0.7, -0.2]]])  # of fields 0 and 1, and of field 2 alone
    torch.testing.assert_close(tower(x)[:, 3:], pooled.tanh().tanh())


def test_a_tie_is_pooled_once() -> None:
    tower = FGCNN((2, 1), num_channels=(1,), kernel_height=1, num_new=1, batch_norm=False).double()
    x = torch.full((1, 2, 1), 0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(tower(x)[0, 2, 0], x)
    assert (gradient != 0).sum() == 1


def test_positions_of_the_embedding_do_not_mix_before_the_recombination() -> None:
    torch.manual_seed(0)
    tower = FGCNN((7, 5), num_channels=(3, 4), kernel_height=3).eval()
    states: list[Tensor] = []
    for layer in tower.recombinations:
        layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    x, order = torch.randn(4, 7, 5), torch.randperm(5)
    generated, moved = tower(x), tower(x[:, :, order])
    for height, channels, plain, permuted in zip((4, 2), (3, 4), states[:2], states[2:], strict=True):
        shape = (4, channels, height, 5)
        torch.testing.assert_close(permuted.view(shape), plain.view(shape)[..., order])
    assert not torch.allclose(moved[:, 7:], generated[:, 7:][:, :, order])


def test_the_order_of_fields_matters_to_new_fields_only() -> None:
    torch.manual_seed(0)
    tower = FGCNN((6, 4), num_channels=(3,), kernel_height=3).eval()
    x = torch.randn(3, 6, 4)
    order = torch.tensor([1, 0, 2, 5, 3, 4])
    plain, moved = tower(x), tower(x[:, order])
    assert (plain[:, 6:] - moved[:, 6:]).abs().max() > 0.01
    products = [IPNN((6, 4))(fields[:, :6])[:, 24:].sort(dim=1).values for fields in (plain, moved)]
    torch.testing.assert_close(*products)


def test_a_local_kernel_does_not_see_far_fields() -> None:
    torch.manual_seed(0)
    tower = FGCNN((8, 2), num_channels=(3,), kernel_height=3, num_new=1).eval()
    states: list[Tensor] = []
    tower.recombinations[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].view(-1, 3, 4, 2)))
    x = torch.randn(1, 8, 2)
    changed = x.clone()
    changed[:, 0] += 1
    tower(x), tower(changed)
    assert (states[0] != states[1]).any(3).any(1)[0].tolist() == [True, False, False, False]


def test_without_recombination_the_logit_is_that_of_ipnn_on_raw_and_zero_fields() -> None:
    torch.manual_seed(0)
    fgcnn = FGCNN((10, 4), num_raw=5, num_channels=(3, 4), kernel_height=3)
    for layer in fgcnn.recombinations:
        nn.init.zeros_(layer.weight)
    products = IPNN(fgcnn.out_shape)
    classifier = Stack(products, MLP(products.out_shape, hidden=(6,)))
    x = torch.randn(7, 10, 4)
    alone = torch.cat([x[:, :5], torch.zeros(7, fgcnn.out_shape[0] - 5, 4)], dim=1)
    torch.testing.assert_close(Stack(fgcnn, classifier).eval()(x), classifier(alone), rtol=0, atol=0)


def test_own_tables_for_the_convolution_leave_the_raw_fields_alone() -> None:
    torch.manual_seed(0)
    tower = FGCNN((7, 4), num_raw=3, num_channels=(3,), kernel_height=3).eval()
    x = torch.randn(2, 7, 4)
    out = tower(x)
    torch.testing.assert_close(out[:, :3], x[:, :3], rtol=0, atol=0)
    other = torch.cat([torch.randn(2, 3, 4), x[:, 3:]], dim=1)
    torch.testing.assert_close(tower(other)[:, 3:], out[:, 3:], rtol=0, atol=0)
    # The same fields twice are what sharing means.
    shared = FGCNN((4, 4), num_channels=(3,), kernel_height=3).eval()
    twice = FGCNN((8, 4), num_raw=4, num_channels=(3,), kernel_height=3).eval()
    twice.load_state_dict(shared.state_dict())
    x = torch.randn(2, 4, 4)
    torch.testing.assert_close(twice(torch.cat([x, x], dim=1)), shared(x), rtol=0, atol=0)


def test_starts_like_fuxictr() -> None:
    torch.manual_seed(0)
    tower = FGCNN((13, 8))
    for (convolution, _), recombination in zip(tower.convolutions, tower.recombinations, strict=True):
        bound = (convolution.in_channels * 7) ** -0.5  # torch's own: uniform, 1 / sqrt(fan in)
        assert 0.9 * bound < convolution.weight.abs().max() <= bound
        expected = (2 / (recombination.in_features + recombination.out_features)) ** 0.5
        assert abs(recombination.weight.std().item() / expected - 1) < 0.05
        assert not recombination.bias.any()


test_variants = conforms(
    {
        "own_fields": lambda shape: FGCNN(shape, num_raw=2, num_channels=(3, 4), kernel_height=3, num_new=2),
        "without_norm": lambda shape: FGCNN(shape, num_channels=(3,), kernel_height=3, batch_norm=False),
    }
)


def test_wrong_use_says_how_to_mend_it() -> None:
    with pytest.raises(ValueError, match=r"kernel_height must be odd.* got 4: take 3 or 5"):
        FGCNN((5, 4), kernel_height=4)
    for wrong in ({"num_channels": ()}, {"num_channels": (3, 0)}, {"pooling_size": 0}, {"num_new": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            FGCNN((5, 4), **wrong)  # type: ignore[arg-type]
    for num_raw in (0, 5):
        with pytest.raises(ValueError, match=f"num_raw must be from 1 to 4.* got {num_raw}: append"):
            FGCNN((5, 4), num_raw=num_raw)


def test_new_fields_alone_learn_what_raw_fields_alone_cannot() -> None:
    """Planted: the logit is 1.5 times a sign that depends on two neighbouring ids; the best AUC is sigmoid(1.5)."""
    signs = torch.ones(1, 1)
    for _ in range(3):  # Hadamard's matrix of order 8, by Sylvester's doubling
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    # Without the first row and column, and doubled once more, so that every row and every column sums to 0.
    signs = torch.kron(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), signs[1:, 1:])
    chance = torch.sigmoid(1.5 * signs).flatten()  # of a positive label in each cell
    ids = torch.cartesian_prod(torch.arange(14), torch.arange(14))

    def trained_auc(*, raw: bool, new: bool, products: bool) -> float:
        torch.manual_seed(0)
        tables = nn.Parameter(0.3 * torch.randn(2, 14, 8))
        fgcnn = FGCNN((2, 8), num_channels=(8,), kernel_height=3)
        pairs = IPNN(fgcnn.out_shape)
        head = LinearHead(pairs.out_shape)
        fields = torch.tensor([raw] * 2 + [new] * 3).float().unsqueeze(1)
        kept = torch.tensor([True] * (5 * 8) + [products] * 10).float()
        optimiser = torch.optim.Adam([tables, *fgcnn.parameters(), *head.parameters()], lr=0.02)
        for _ in range(150):
            optimiser.zero_grad()
            x = torch.stack([tables[0, ids[:, 0]], tables[1, ids[:, 1]]], dim=1)
            logits = head(pairs(fgcnn(x) * fields) * kept)[:, 0]
            torch.autograd.backward(nn.functional.binary_cross_entropy_with_logits(logits, chance))
            optimiser.step()
        logits = logits.detach().round(decimals=3)
        wins = (logits[:, None] > logits).double() + 0.5 * (logits[:, None] == logits)
        weights = chance.double()[:, None] * (1 - chance.double())
        return ((wins * weights).sum() / weights.sum()).item()

    best = 0.8176
    assert trained_auc(raw=True, new=True, products=True) > best - 0.003
    assert trained_auc(raw=False, new=True, products=False) > best - 0.003
    assert trained_auc(raw=True, new=False, products=True) > best - 0.003
    assert abs(trained_auc(raw=True, new=False, products=False) - 0.5) < 0.01
