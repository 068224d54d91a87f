"""FinalMLP against its equations written out, published parameter counts, and planted interactions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conformance import conforms
from torch import Tensor, nn

from ctrlib.embeddings.table import TableEmbedding
from ctrlib.heads.linear import LinearHead
from ctrlib.metrics import auc
from ctrlib.schema import Categorical, Schema
from ctrlib.testing import example_batch
from ctrlib.towers.combine import Parallel
from ctrlib.towers.finalmlp import BilinearFusion, FinalMLP
from ctrlib.towers.mlp import MLP

SMALL = {"hidden_1": (6, 4), "hidden_2": (8,), "gate_hidden": (7,), "num_heads": 2}
test_variants = conforms(
    {
        "appended_contexts": lambda s: FinalMLP(s, num_fields=s[0] - 2, contexts=((s[0] - 1,), (s[0] - 2,)), **SMALL),  # type: ignore[arg-type]
        "shared_fields": lambda s: FinalMLP(s, contexts=((0, 2), ()), **SMALL),  # type: ignore[arg-type]
        "no_gates": lambda s: FinalMLP(s, contexts=None, **SMALL),  # type: ignore[arg-type]
        "batch_norm_dropout": lambda s: FinalMLP(
            s, batch_norm_1=True, dropout_2=0.3, hidden_1=(4,), hidden_2=(2,), gate_hidden=(3, 2), zero_context=True
        ),
    }
)


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def scatter(module: nn.Module, std: float = 0.5) -> None:
    """Parameters and running statistics away from their starting values, so that each has its effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def by_hand(tower: FinalMLP, head: LinearHead, x: Tensor, contexts: tuple[Sequence[int], Sequence[int]]) -> Tensor:
    """The published logit of every row, from the state dict, one row and one sum after the other."""
    state = {**tower.state_dict(), **{f"head.{name}": value for name, value in head.state_dict().items()}}

    def linear(name: str, v: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return torch.stack([(w * v).sum() + b for w, b in zip(weight, bias)])

    def norm(name: str, v: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        out: Tensor = (v - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]
        return out

    logits = []
    for row in x:
        e = torch.cat([row[field] for field in range(tower.num_fields)])
        o = []
        for s, context in enumerate(contexts):
            c = torch.cat([row[p] for p in context]) if context else state[f"gates.{s}.vector"][0]
            hidden = linear(f"gates.{s}.layers.0.0", c).clamp(min=0)
            g = 2 / (1 + (-linear(f"gates.{s}.layers.1", hidden)).exp())
            stream = f"stream_{s + 1}"
            o.append(norm(f"{stream}.1", linear(f"{stream}.0", g * e)).clamp(min=0))
        weight = state["fusion.weight"]
        a, b = weight.shape[1:]
        fused = sum(
            o[0][k * a + i] * weight[k, i, j] * o[1][k * b + j]
            for k in range(len(weight))
            for i in range(a)
            for j in range(b)
        )
        first_order = (state["head.linear.weight"][0] * torch.cat(o)).sum()
        logits.append(first_order + state["head.bias"][0] + fused)
    return torch.stack(logits)


@pytest.mark.parametrize("contexts", [((), ()), ((3,), (4,)), ((4, 3, 0), ())])
def test_logit_is_the_published_equation(contexts: tuple[Sequence[int], Sequence[int]]) -> None:
    torch.manual_seed(1)
    appended = {p for context in contexts for p in context if p > 2}
    shape = (3 + len(appended), 2)
    tower = FinalMLP(
        shape,
        num_fields=3,
        contexts=contexts,
        hidden_1=(6,),
        hidden_2=(4,),
        batch_norm_1=True,
        batch_norm_2=True,
        dropout_1=0.5,
        gate_hidden=(5,),
        num_heads=2,
    )
    head = LinearHead(tower.out_shape, unweighted=1)
    network = nn.Sequential(tower, head).double().eval()
    scatter(network)
    x = torch.randn(7, *shape, dtype=torch.float64)
    torch.testing.assert_close(network(x)[:, 0], by_hand(tower, head, x, contexts))


def test_hand_vector() -> None:
    o_1, o_2 = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1.0, -1.0]])
    fusion = BilinearFusion((4, 2), num_heads=2)
    head = LinearHead((7,), unweighted=1)
    with torch.no_grad():
        fusion.weight.copy_(torch.tensor([[[0.1], [0.2]], [[0.3], [0.4]]]))
        head.linear.weight.copy_(torch.tensor([[0.1] * 4 + [0.5] * 2]))  # type: ignore[union-attr]
        head.bias.fill_(0.05)
    bilinear = fusion(o_1, o_2)
    assert bilinear.item() == pytest.approx(-2.0, abs=1e-6)  # (.1 + .4) * 1 + (.9 + 1.6) * -1
    assert head(torch.cat([o_1, o_2, bilinear], dim=1)).item() == pytest.approx(-0.95, abs=1e-6)  # 1 + 0 + .05 - 2


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_fusion_is_a_block_diagonal_bilinear_form(num_heads: int) -> None:
    fusion = BilinearFusion((8, 12), num_heads=num_heads).double()
    full = torch.zeros(8, 12, dtype=torch.float64)
    for k, block in enumerate(fusion.weight.detach()):
        full[k * len(block) :, k * block.shape[1] :][: len(block), : block.shape[1]] = block
    assert (num_heads == 1) == bool((full != 0).all())
    o_1, o_2 = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(fusion(o_1, o_2)[:, 0], torch.einsum("bi,ij,bj->b", o_1, full, o_2))


def test_fusion_starts_at_the_xavier_scale_of_its_flattened_weights() -> None:
    torch.manual_seed(0)
    weight = BilinearFusion((400, 800), num_heads=10).weight
    std = math.sqrt(2 / (10 * 40 * 80 + 1))
    assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


def test_gates_start_at_one() -> None:
    torch.manual_seed(0)
    gated = FinalMLP((4, 10), num_fields=3, contexts=((), (3,)), hidden_1=(8,), hidden_2=(8,), zero_context=True)
    assert gated.gates is not None
    x = torch.randn(50, 4, 10)
    x[:, 3] *= 1e-4  # as context tables start
    assert torch.equal(2 * gated.gates[0](x), torch.ones(1, 30))
    assert (2 * gated.gates[1](x) - 1).abs().max() < 3e-4
    learnable = FinalMLP((3, 10), hidden_1=(8,), hidden_2=(8,))
    assert learnable.gates is not None
    for gate in learnable.gates:
        assert 0 < (2 * gate(x) - 1).abs().max() < 0.05
        assert 0.003 < gate.get_parameter("vector").std().item() < 0.03


def test_gates_lie_between_zero_and_two() -> None:
    torch.manual_seed(0)
    tower = FinalMLP((4, 3), num_fields=3, contexts=((3,), (3,)), hidden_1=(2,), hidden_2=(2,))
    scatter(tower, std=1.0)
    assert tower.gates is not None
    gates = 2 * torch.cat([gate(torch.randn(200, 4, 3)) for gate in tower.gates])
    assert gates.min() >= 0 and gates.max() <= 2
    assert gates.min() < 0.01 and gates.max() > 1.99


def test_streams_read_the_fields_and_gates_their_contexts() -> None:
    torch.manual_seed(0)
    tower = FinalMLP((5, 3), num_fields=3, contexts=((3,), (4,)), hidden_1=(16,), hidden_2=(16,), gate_hidden=(16,))
    scatter(tower)
    x = torch.randn(1, 5, 3)
    reached = []
    for field in range(5):
        other = x.clone()
        other[:, field] += 1
        o_1, o_2, _ = (tower(other) - tower(x)).split([16, 16, 1], dim=1)
        reached.append((bool(o_1.any()), bool(o_2.any())))
    assert reached == [(True, True)] * 3 + [(True, False), (False, True)]
    at_zero = x.clone()
    at_zero[:, :3] = 0
    moved = at_zero.clone()
    moved[:, 3:] += 1
    assert torch.equal(tower(at_zero), tower(moved))  # a gate only scales: contexts are no inputs of their own


def test_without_gates_and_fusion_it_is_dual_mlp() -> None:
    torch.manual_seed(0)
    settings = {"batch_norm_1": True, "batch_norm_2": True, "num_heads": 2, "zero_context": True}
    final = FinalMLP((3, 4), hidden_1=(8, 6), hidden_2=(10,), **settings)  # type: ignore[arg-type]
    nn.init.zeros_(final.fusion.weight)
    first = MLP((3, 4), hidden=(8, 6), batch_norm=True)
    second = MLP((3, 4), hidden=(10,), batch_norm=True)
    first.layers, second.layers = final.stream_1, final.stream_2
    head, dual_head = LinearHead(final.out_shape, unweighted=1), LinearHead((16,))
    dual_head.load_state_dict(head.state_dict())
    x = torch.randn(9, 3, 4)
    torch.testing.assert_close(head(final(x)), dual_head(Parallel(first, second)(x)))


def test_streams_can_be_swapped() -> None:
    torch.manual_seed(0)
    tower = FinalMLP((5, 3), num_fields=3, contexts=((3,), (4,)), hidden_1=(4,), hidden_2=(6,), num_heads=2)
    scatter(tower)
    swapped = FinalMLP((5, 3), num_fields=3, contexts=((4,), (3,)), hidden_1=(6,), hidden_2=(4,), num_heads=2)
    swapped.stream_1, swapped.stream_2 = tower.stream_2, tower.stream_1
    assert tower.gates is not None
    swapped.gates = nn.ModuleList(reversed(list(tower.gates)))
    swapped.fusion.weight.data = tower.fusion.weight.detach().transpose(1, 2).contiguous()
    x = torch.randn(9, 5, 3)
    o_1, o_2, fused = tower(x).split([4, 6, 1], dim=1)
    torch.testing.assert_close(swapped(x), torch.cat([o_2, o_1, fused], dim=1))


@pytest.mark.parametrize("zero_context", [True, False])
def test_a_gate_at_zero_context_never_wakes_up(zero_context: bool) -> None:
    torch.manual_seed(0)
    tower = FinalMLP((3, 4), hidden_1=(8,), hidden_2=(8,), gate_hidden=(16,), zero_context=zero_context)
    network = nn.Sequential(tower, LinearHead(tower.out_shape, unweighted=1))
    assert tower.gates is not None
    before = copy.deepcopy(tower.gates.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    x = torch.randn(64, 3, 4)
    y = (x[:, 0, :1] > 0).float()
    for _ in range(500):
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(network(x), y))
        optimizer.step()
    moved = {name for name, value in tower.gates.state_dict().items() if not torch.equal(value, before[name])}
    last_biases = {"0.layers.1.bias", "1.layers.1.bias"}
    assert moved == (last_biases if zero_context else set(before))


# FuxiCTR's rows of the log files: values, padding and out of vocabulary.
FRAPPE = {
    "user": 956,
    "item": 4084,
    "daytime": 9,
    "weekday": 9,
    "isweekend": 4,
    "homework": 5,
    "cost": 4,
    "weather": 11,
    "country": 82,
    "city": 235,
}
MOVIELENS_ROWS = 16_977 + 23_606 + 49_659
CRITEO_X1_ROWS, CRITEO_X1_C6 = 2_086_329, 23
CRITEO_X4_ROWS = 910_747


@pytest.mark.parametrize(
    ("tower", "embedding_weights", "published"),
    [
        (
            lambda: FinalMLP(
                (3, 10),
                hidden_1=(400,),
                hidden_2=(800,),
                batch_norm_1=True,
                batch_norm_2=True,
                dropout_1=0.4,
                dropout_2=0.2,
                num_heads=10,
                gate_hidden=(800,),
            ),
            MOVIELENS_ROWS * 10,
            1_040_902,
        ),
        (
            lambda: FinalMLP(
                (12, 10),
                num_fields=10,
                contexts=((10,), (11,)),
                hidden_1=(400,),
                hidden_2=(100,),
                batch_norm_1=True,
                batch_norm_2=True,
                dropout_1=0.4,
                dropout_2=0.4,
                num_heads=5,
                gate_hidden=(400,),
            ),
            (sum(FRAPPE.values()) + FRAPPE["user"] + FRAPPE["item"]) * 10,
            253_392,
        ),
        (
            lambda: FinalMLP(
                (39 + 14, 10),
                num_fields=39,
                contexts=(range(39, 52), (52,)),
                hidden_1=(400, 400, 400),
                hidden_2=(1000,),
                batch_norm_1=True,
                batch_norm_2=True,
                dropout_1=0.2,
                dropout_2=0.3,
                num_heads=200,
                gate_hidden=(800,),
            ),
            # 13 numeric vectors and 26 tables; again 13 vectors and C6 as contexts.
            (13 + CRITEO_X1_ROWS + 13 + CRITEO_X1_C6) * 10,
            22_478_162,
        ),
        (
            lambda: FinalMLP((39, 16), contexts=None, hidden_1=(1000,) * 5, hidden_2=(500,), num_heads=50),
            CRITEO_X4_ROWS * 16,
            19_524_954,
        ),
    ],
    ids=["movielens", "frappe", "criteo_x1", "criteo_x4"],
)
def test_published_parameter_counts(tower: Callable[[], FinalMLP], embedding_weights: int, published: int) -> None:
    built = tower()
    network = num_parameters(built, LinearHead(built.out_shape, unweighted=1))
    assert network + 1 + embedding_weights == published  # FuxiCTR: one bias for each stream, we: one in all


@pytest.mark.parametrize(
    ("num_fields", "hidden", "embedding_weights", "published"),
    [
        (3, ((400, 400, 400), (400,)), MOVIELENS_ROWS * 10, 1_252_022),
        (10, ((400, 400, 400), (500, 500, 500)), sum(FRAPPE.values()) * 10, 972_992),
    ],
    ids=["movielens", "frappe"],
)
def test_published_parameter_counts_of_dual_mlp(
    num_fields: int, hidden: tuple[Sequence[int], Sequence[int]], embedding_weights: int, published: int
) -> None:
    tower = Parallel(*(MLP((num_fields, 10), hidden=widths, batch_norm=True) for widths in hidden))
    assert num_parameters(tower, LinearHead(tower.out_shape)) + 1 + embedding_weights == published  # two biases there


def test_frappe_with_contexts_from_tables_of_their_own() -> None:
    fields = tuple(Categorical(name, num_embeddings=rows) for name, rows in FRAPPE.items())
    schema = Schema(fields, ("label",))
    embedding = TableEmbedding(fields, embedding_dim=10)
    context = TableEmbedding(fields[:2], embedding_dim=10)  # user and item once more
    tower = FinalMLP(
        (12, 10),
        num_fields=10,
        contexts=((10,), (11,)),
        hidden_1=(400,),
        hidden_2=(100,),
        batch_norm_1=True,
        batch_norm_2=True,
        num_heads=5,
        gate_hidden=(400,),
    )
    head = LinearHead(tower.out_shape, unweighted=1)
    assert num_parameters(embedding, context, tower, head) + 1 == 253_392
    batch = example_batch(schema, 6)
    logits = head(tower(torch.cat([embedding(batch), context(batch)], dim=1)))
    torch.autograd.backward(logits.sum())
    assert all(parameter.grad is not None for parameter in context.parameters())


def planted_auc(m: Tensor, num_heads: int | None, num_rows: int = 20_000) -> float:
    """Test AUC of logistic regression on [x, v, fusion of x and v] where the logit is .7 x^T M v."""
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 2 * num_rows, 8, generator=generator)
    truth = 0.7 * torch.einsum("bi,ij,bj->b", x, m, v)
    y = torch.bernoulli(truth.sigmoid(), generator=generator)
    torch.manual_seed(0)
    fusion = None if num_heads is None else BilinearFusion((8, 8), num_heads=num_heads)
    head = LinearHead((16 if fusion is None else 17,), unweighted=0 if fusion is None else 1)
    parts = [part for part in (fusion, head) if part is not None]
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=0.05)

    def logits(rows: slice) -> Tensor:
        fused = [] if fusion is None else [fusion(x[rows], v[rows])]
        out: Tensor = head(torch.cat([x[rows], v[rows], *fused], dim=1))[:, 0]
        return out

    train, test = slice(0, num_rows), slice(num_rows, None)
    for _ in range(150):
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy_with_logits(logits(train), y[train]))
        optimizer.step()
    with torch.no_grad():
        return auc(y[test].numpy(), logits(test).numpy())


def orthogonal(size: int, seed: int) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))[0]
    return q


def test_planted_fusion() -> None:
    whole = orthogonal(8, 0)
    assert planted_auc(whole, num_heads=1) > 0.84
    assert 0.6 < planted_auc(whole, num_heads=2) < 0.8  # the blocks hold a part of M
    assert 0.47 < planted_auc(whole, num_heads=None) < 0.53
    first, second, nothing = orthogonal(4, 1), orthogonal(4, 2), torch.zeros(4, 4)
    on_blocks = torch.cat([torch.cat([first, nothing], 1), torch.cat([nothing, second], 1)])
    assert planted_auc(on_blocks, num_heads=1) > 0.84
    assert planted_auc(on_blocks, num_heads=2) > 0.84
    off_blocks = torch.cat([torch.cat([nothing, first], 1), torch.cat([second, nothing], 1)])
    assert planted_auc(off_blocks, num_heads=1) == pytest.approx(0.85, abs=0.01)
    assert planted_auc(off_blocks, num_heads=2) == pytest.approx(0.5, abs=0.02)


def test_planted_context_decides_which_input_counts() -> None:
    """The context says whether x_1 or x_2 makes the label: only a gate that reads it can know."""
    generator = torch.Generator().manual_seed(0)
    num_rows = 8_000
    context = torch.randint(0, 2, (num_rows,), generator=generator)
    x = torch.zeros(num_rows, 2, 2)
    x[:, 0] = torch.randn(num_rows, 2, generator=generator)
    x[torch.arange(num_rows), 1, context] = 1.0
    y = torch.bernoulli((3 * x[torch.arange(num_rows), 0, context]).sigmoid(), generator=generator)
    half = num_rows // 2
    scores = {}
    for name, contexts, fields in (("gated", ((1,), (1,)), x), ("static", ((), ()), x[:, :1])):
        torch.manual_seed(0)
        shape = (fields.shape[1], 2)
        tower = FinalMLP(shape, num_fields=1, contexts=contexts, hidden_1=(16,), hidden_2=(16,), gate_hidden=(16,))
        network = nn.Sequential(tower, LinearHead(tower.out_shape, unweighted=1))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(network(fields[:half])[:, 0], y[:half])
            torch.autograd.backward(loss)
            optimizer.step()
        with torch.no_grad():
            scores[name] = auc(y[half:].numpy(), network(fields[half:])[:, 0].numpy())
    bayes = auc(y[half:].numpy(), x[torch.arange(num_rows), 0, context][half:].numpy())
    assert scores["gated"] > bayes - 0.015
    assert scores["static"] < bayes - 0.08


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FinalMLP((3, 4), hidden_1=(6,), hidden_2=(4,), num_heads=4), r"num_heads=4 and widths \(6, 4\)"),
        (lambda: BilinearFusion((4, 4), num_heads=0), "num_heads=0"),
        (lambda: FinalMLP((3, 4), contexts=((3,), ())), r"0 to 2, got \[3\]"),
        (lambda: FinalMLP((3, 4), contexts=((-1,), ())), r"got \[-1\]"),
        (lambda: FinalMLP((3, 4), contexts=((1,),)), "two lists of field positions"),  # type: ignore[arg-type]
        (lambda: FinalMLP((3, 4), num_fields=4), "between 1 and the 3 fields"),
        (lambda: FinalMLP((3, 4), num_fields=0), "got 0"),
        (lambda: FinalMLP((5, 4), num_fields=3, contexts=((3,), ())), r"fields \[4\] are read by no stream"),
        (lambda: FinalMLP((5, 4), num_fields=3, contexts=None), r"fields \[3, 4\].*num_fields=5"),
        (lambda: FinalMLP((3, 4), hidden_1=()), "one or more positive"),
        (lambda: FinalMLP((3, 4), gate_hidden=()), "one or more positive"),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
