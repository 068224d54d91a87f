"""MaskNet against its equations, the invariances of its normalisations, and published parameter counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from conformance import conforms
from torch import Tensor, nn

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Stack
from ctrlib.towers.masknet import FieldNorm, MaskBlock, ParallelMaskNet, SerialMaskNet
from ctrlib.towers.mlp import MLP

M = TypeVar("M", bound=nn.Module)

test_variants = conforms(
    {
        "serial": lambda s: SerialMaskNet(s, hidden=(24, 16), dropout=0.2),
        "serial_plain": lambda s: SerialMaskNet(s, hidden=(24, 16), embedding_norm=False, layer_norm=False),
        "parallel": lambda s: ParallelMaskNet(s, num_blocks=2, block_dim=16, reduction_ratio=1.5),
        "parallel_plain": lambda s: ParallelMaskNet(
            s, num_blocks=2, block_dim=16, embedding_norm=False, layer_norm=False
        ),
    }
)


def randomized(module: M, seed: int = 0) -> M:
    """In float64, with every parameter, gains and biases included, drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def fields(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_norm(h: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Of one vector: g * (h - mean) / sqrt(variance + eps) + b, the variance over all elements."""
    centred = h - h.sum() / len(h)
    return gain * centred / ((centred**2).sum() / len(h) + 1e-5).sqrt() + bias


def embedding_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """LN_EMB of one row (F, D), field by field, flattened; the fields as they are without the norm."""
    if not isinstance(norm, FieldNorm):
        return x.flatten()
    return torch.cat([layer_norm(field, gain, bias) for field, gain, bias in zip(x, norm.weight, norm.bias)])


def mask_block(v_emb: Tensor, h: Tensor, block: MaskBlock) -> Tensor:
    """One row through one block, from the block's weights by name."""
    weights = dict(block.named_parameters())
    aggregated = (weights["mask.0.weight"] @ v_emb + weights["mask.0.bias"]).clamp(min=0)
    v_mask = weights["mask.2.weight"] @ aggregated + weights["mask.2.bias"]
    out = weights["hidden.0.weight"] @ (v_mask * h)
    if "hidden.1.weight" in weights:
        out = layer_norm(out, weights["hidden.1.weight"], weights["hidden.1.bias"])
    return out.clamp(min=0)


def test_field_norm_normalises_every_field_alone() -> None:
    norm = FieldNorm((3, 4))
    randomized(norm)
    x = fields(5, 3, 4)
    expected = torch.stack([embedding_norm(row, norm).view(3, 4) for row in x])
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("with_embedding_norm", [True, False])
@pytest.mark.parametrize("with_layer_norm", [True, False])
def test_serial_masknet_follows_the_equations(with_embedding_norm: bool, with_layer_norm: bool) -> None:
    tower = SerialMaskNet(
        (3, 4), hidden=(7, 5), reduction_ratio=1.5, embedding_norm=with_embedding_norm, layer_norm=with_layer_norm
    )
    randomized(tower)
    x = fields(6, 3, 4)
    expected = []
    for row in x:
        h = embedding_norm(row, tower.norm)
        for block in tower.blocks:
            h = mask_block(row.flatten(), h, block)
        expected.append(h)
    torch.testing.assert_close(tower(x), torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(tower, x[:2].clone().requires_grad_())


@pytest.mark.parametrize("with_embedding_norm", [True, False])
@pytest.mark.parametrize("with_layer_norm", [True, False])
def test_parallel_masknet_follows_the_equations(with_embedding_norm: bool, with_layer_norm: bool) -> None:
    tower = ParallelMaskNet(
        (3, 4), num_blocks=3, block_dim=5, embedding_norm=with_embedding_norm, layer_norm=with_layer_norm
    )
    randomized(tower)
    x = fields(6, 3, 4)
    expected = [
        torch.cat([mask_block(row.flatten(), embedding_norm(row, tower.norm), block) for block in tower.blocks])
        for row in x
    ]
    torch.testing.assert_close(tower(x), torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_masks_see_the_embeddings_before_the_norm() -> None:
    # LN_EMB forgets a field's scale and shift; the masks do not. A constant mask leaves the normed path only.
    tower = ParallelMaskNet((3, 4), num_blocks=2, block_dim=5)
    randomized(tower)
    x = fields(6, 3, 4)
    moved = 2.5 * x + fields(6, 3, 1, seed=2)
    assert not torch.allclose(tower(x), tower(moved), rtol=1e-2)
    with torch.no_grad():
        for block in tower.blocks:
            block.mask[2].weight.zero_()
    torch.testing.assert_close(tower(x), tower(moved), rtol=1e-3, atol=1e-3)


def test_the_scale_of_a_mask_does_not_get_through_layer_norm() -> None:
    # W has no bias and LN divides by the scale, so a mask 1,000 times larger gives the same block, but for LN's eps.
    block = MaskBlock(12, 12, 5)
    plain = MaskBlock(12, 12, 5, layer_norm=False)
    randomized(block), randomized(plain)
    x = fields(6, 12)
    before, before_plain = block(x, x), plain(x, x)
    with torch.no_grad():
        for part in (block, plain):
            part.mask[2].weight.mul_(1000)
            part.mask[2].bias.mul_(1000)
    torch.testing.assert_close(block(x, x), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain(x, x), 1000 * before_plain)


def test_a_mask_of_ones_is_a_plain_hidden_layer() -> None:
    tower = SerialMaskNet((3, 4), hidden=(7, 5), embedding_norm=False, layer_norm=False)
    randomized(tower)
    h = x = fields(6, 12)
    for block in tower.blocks:
        nn.init.zeros_(block.mask[2].weight)
        nn.init.ones_(block.mask[2].bias)
        h = torch.relu(h @ block.hidden[0].weight.T)
    torch.testing.assert_close(tower(x.view(6, 3, 4)), h)


def test_parallel_blocks_keep_to_their_own_columns() -> None:
    tower = ParallelMaskNet((3, 4), num_blocks=3, block_dim=5)
    randomized(tower)
    x = fields(6, 3, 4)
    before = tower(x)
    nn.init.zeros_(tower.blocks[1].hidden[1].bias)
    changed = (tower(x) != before).any(0).view(3, 5)
    assert changed.any(1).tolist() == [False, True, False]


def test_dropout_comes_last_in_every_block() -> None:
    torch.manual_seed(0)
    tower = SerialMaskNet((3, 4), hidden=(7, 200), dropout=0.25)
    names = [type(layer).__name__ for layer in tower.blocks[0].hidden]
    assert names == ["Linear", "LayerNorm", "ReLU", "Dropout"]
    one_block = ParallelMaskNet((3, 4), num_blocks=1, block_dim=400, dropout=0.25)
    x = torch.randn(50, 3, 4)
    dropped, whole = one_block(x), one_block.eval()(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert kept[whole > 0].float().mean().item() == pytest.approx(0.75, abs=0.02)


def num_parameters(*parts: nn.Module) -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def block_size(num_mask_inputs: int, num_inputs: int, num_outputs: int, ratio: int) -> int:
    """Aggregation and projection with biases, W without one, gain and bias of the layer norm."""
    aggregated = ratio * num_inputs
    mask = (num_mask_inputs + 1) * aggregated + (aggregated + 1) * num_inputs
    return mask + num_inputs * num_outputs + 2 * num_outputs


def test_published_parameter_count_on_movielens() -> None:
    tower = SerialMaskNet((3, 10), hidden=(400, 400, 400), reduction_ratio=4, embedding_norm=False, dropout=0.5)
    closed_form = block_size(30, 30, 400, 4) + 2 * block_size(30, 400, 400, 4) + 401
    network = num_parameters(tower, LinearHead(tower.out_shape))
    assert network == closed_form == 2_624_541 - 90_239 * 10
    # With LN_EMB: a gain and a bias for every field.
    with_norm = SerialMaskNet((3, 10), hidden=(400, 400, 400), reduction_ratio=4)
    assert num_parameters(with_norm, LinearHead((400,))) == closed_form + 2 * 3 * 10


def test_published_parameter_count_on_frappe() -> None:
    blocks = ParallelMaskNet((10, 10), num_blocks=3, block_dim=50, reduction_ratio=2, embedding_norm=False, dropout=0.1)
    mlp = MLP(blocks.out_shape, hidden=(400, 400, 400), dropout=0.1)
    tower = Stack(blocks, mlp)
    closed_form = 3 * block_size(100, 100, 50, 2) + (150 + 1) * 400 + 2 * 401 * 400 + 401
    assert num_parameters(tower, LinearHead(tower.out_shape)) == closed_form == 571_691 - 5_389 * 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SerialMaskNet((2, 4), hidden=()), "one or more positive integers, got"),
        (lambda: SerialMaskNet((2, 4), hidden=(4, 0)), r"got \(4, 0\)"),
        (lambda: SerialMaskNet((2, 4), reduction_ratio=0.1), "got 0.1 times 8: use a larger ratio"),
        (lambda: ParallelMaskNet((2, 4), reduction_ratio=-1), "got -1 times 8"),
        (lambda: ParallelMaskNet((2, 4), num_blocks=0), "num_blocks=0"),
        (lambda: ParallelMaskNet((2, 4), block_dim=0), "block_dim=0"),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
