"""The dot interaction against its pairs written out, TorchRec, FM, and the identities of dot products."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conformance import conforms
from torch import Tensor
from torchrec.models.dlrm import InteractionArch

from ctrlib.heads.linear import LinearHead
from ctrlib.towers.combine import Stack
from ctrlib.towers.dlrm import DotInteraction
from ctrlib.towers.fm import FM
from ctrlib.towers.mlp import MLP

test_variants = conforms(
    {
        "dense": lambda s: DotInteraction(s, dense_fields=[0]),
        "two_dense": lambda s: DotInteraction(s, dense_fields=(2, 1)),
    }
)


def fields(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(x: Tensor, dense_fields: tuple[int, ...] = ()) -> Tensor:
    rows = []
    for row in x.tolist():
        out = [value for k in dense_fields for value in row[k]]
        for e_i, e_j in itertools.combinations(row, 2):
            out.append(sum(a * b for a, b in zip(e_i, e_j)))
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dense_fields", [(), (0,), (4,), (3, 1)])
def test_every_pair_once_behind_the_dense_fields(dense_fields: tuple[int, ...]) -> None:
    x = fields(6, 5, 4)
    tower = DotInteraction((5, 4), dense_fields=dense_fields)
    torch.testing.assert_close(tower(x), written_out(x, dense_fields))


@pytest.mark.parametrize("num_fields", [2, 3, 7])
def test_gradient_is_that_of_the_pairs(num_fields: int) -> None:
    x = fields(4, num_fields, 3).requires_grad_()
    first, second = torch.triu_indices(num_fields, num_fields, offset=1)
    pairs = (x[:, first] * x[:, second]).sum(2)
    weight = fields(*pairs.shape, seed=1)
    (expected,) = torch.autograd.grad((pairs * weight).sum(), x)
    (got,) = torch.autograd.grad((DotInteraction((num_fields, 3))(x) * weight).sum(), x)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(DotInteraction((num_fields, 3), dense_fields=[1]), x)


def test_gradient_stays_with_its_row() -> None:
    x = fields(4, 5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(DotInteraction((5, 3), dense_fields=[0])(x)[2].sum(), x)
    assert gradient.flatten(1).any(1).tolist() == [False, False, True, False]


def test_agrees_with_torchrec() -> None:
    dense, sparse = fields(6, 4), fields(6, 3, 4, seed=1)
    expected = InteractionArch(num_sparse_features=3)(dense, sparse)
    tower = DotInteraction((4, 4), dense_fields=[0])
    torch.testing.assert_close(tower(torch.cat([dense.unsqueeze(1), sparse], dim=1)), expected)


def test_pairs_add_up_to_fm() -> None:
    x = fields(6, 5, 4)
    torch.testing.assert_close(DotInteraction((5, 4))(x).sum(1, keepdim=True), FM((5, 4))(x))


def test_pairs_follow_their_fields() -> None:
    x, order = fields(6, 5, 4), [3, 0, 4, 1, 2]
    tower = DotInteraction((5, 4))
    place = {pair: at for at, pair in enumerate(itertools.combinations(range(5), 2))}
    moved = [place[min(i, j), max(i, j)] for i, j in itertools.combinations(order, 2)]
    torch.testing.assert_close(tower(x[:, order]), tower(x)[:, moved])


def test_pairs_do_not_see_a_rotation_and_grow_with_the_square() -> None:
    x = fields(6, 5, 4)
    tower = DotInteraction((5, 4))
    rotation, _ = torch.linalg.qr(fields(4, 4, seed=1))
    torch.testing.assert_close(tower(x @ rotation), tower(x))
    torch.testing.assert_close(tower(3 * x), 9 * tower(x))


def test_widths_are_those_of_the_published_networks() -> None:
    # The paper's code on Criteo: 26 ids and the bottom MLP's vector of width 128 give the top MLP 351 + 128 inputs.
    assert DotInteraction((27, 128), dense_fields=[0]).out_shape == (479,)
    # FuxiCTR's top MLP without numbers: pairs only.
    dots = DotInteraction((10, 10))
    model = Stack(dots, MLP(dots.out_shape, hidden=(400, 400, 400), batch_norm=True))
    head = LinearHead(model.out_shape)
    network = sum(parameter.numel() for part in (model, head) for parameter in part.parameters())
    assert network == (45 + 1) * 400 + 2 * 401 * 400 + 3 * 2 * 400 + 401
    assert not list(dots.parameters()) and not dots.state_dict()


@pytest.mark.parametrize(("in_shape", "published"), [((3, 10), 1_238_391 - 902_390), ((10, 10), 417_891 - 53_890)])
def test_what_bars_calls_dlrm_is_a_plain_mlp(in_shape: tuple[int, int], published: int) -> None:
    mlp = MLP(in_shape, hidden=(400, 400, 400), batch_norm=True)  # interaction_op "cat", no numbers
    assert sum(p.numel() for part in (mlp, LinearHead(mlp.out_shape)) for p in part.parameters()) == published


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DotInteraction((1, 4)), "at least 2 fields"),
        (lambda: DotInteraction((3, 4), dense_fields=[3]), r"distinct positions from 0 to 2, got \[3\]"),
        (lambda: DotInteraction((3, 4), dense_fields=[-1]), r"got \[-1\]"),
        (lambda: DotInteraction((3, 4), dense_fields=[1, 1]), "distinct"),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
