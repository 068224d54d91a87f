"""Packed tables: what is stored comes back, in as many bytes as said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib.embeddings.packed import PackedTable, PackedTables
from ctrlib.schema import Categorical
from ctrlib.testing import check_embedding

# Whole words and short ones, of 1 to 3 bytes; rows of 1 to 11 bytes; unused bits at the end of a word.
LAYOUTS = [
    ((8,),),
    ((1, 2, 3, 2),),
    ((7, 5, 3),),
    ((7, 6, 5, 3, 2, 1),),
    ((16, 8, 8),),
    ((8, 8, 8, 8), (5, 3)),
    ((9, 8, 8, 7), (8, 8, 7, 1)),
    ((8, 8, 8, 8), (8, 8, 8, 7), (8, 8, 6)),
]


def stored(name: str, layout: tuple[tuple[int, ...], ...], rows: int, dim: int) -> tuple[PackedTable, list[Tensor]]:
    """A table, and codes, axes and offset for it; the first rows hold the smallest and the largest codes."""
    generator = torch.Generator().manual_seed(len(name) + rows)
    bits = [bits for word in layout for bits in word]
    codes = torch.stack([torch.randint(0, 2**b, (rows,), generator=generator) for b in bits], 1)
    codes[0], codes[1] = 0, torch.tensor([2**b - 1 for b in bits])
    axes, offset = torch.randn(len(bits), dim, generator=generator), torch.randn(dim, generator=generator)
    return PackedTable(name, (name,), dim, rows=rows, bits=layout), [codes, axes, offset]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_come_back(layout: tuple[tuple[int, ...], ...]) -> None:
    table, (codes, axes, offset) = stored("a", layout, rows=40, dim=5)
    packed = PackedTables([table])
    packed.fill("a", codes, axes, offset)
    ids = torch.arange(40)
    out = packed(KeyedJaggedTensor.from_lengths_sync(["a"], ids, torch.ones(40, dtype=torch.int64)))
    torch.testing.assert_close(out.values(), codes.float() @ axes + offset, rtol=1e-5, atol=1e-3)
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.codes()) == 40 * table.row_bytes
    assert table.row_bytes == sum(-(-sum(word) // 8) for word in layout)


def mixed() -> tuple[PackedTables, dict[str, Tensor]]:
    """Tables of all forms and widths, and the rows that they should give."""
    tables: list[PackedTable] = []
    rows: dict[str, Tensor] = {}
    fills: list[tuple[str, list[Tensor]]] = []
    for number, layout in enumerate([((6, 5, 5),), ((4, 4, 4, 4),), ((8, 8, 8, 8), (4, 4))]):
        name = f"coded_{number}"
        table, parts = stored(name, layout, rows=10 + number, dim=4)
        tables.append(table)
        fills.append((name, parts))
        rows[name] = parts[0].float() @ parts[1] + parts[2]
    tables.append(PackedTable("half", ("half", "twin"), 6, rows=7))
    rows["half"] = rows["twin"] = torch.randn(7, 6).half().float()
    tables.append(PackedTable("bag", ("bag",), 4, rows=9, bits=((4, 4),), pooling="mean"))
    _, parts = stored("bag", ((4, 4),), rows=9, dim=4)
    fills.append(("bag", parts))
    rows["bag"] = parts[0].float() @ parts[1] + parts[2]
    packed = PackedTables(tables, names=["bag", "twin", "coded_2", "coded_0", "half", "coded_1"])
    packed.fill("half", rows["half"])
    for name, parts in fills:
        packed.fill(name, *parts)
    return packed, rows


@pytest.mark.parametrize("single", [True, False])
def test_tables_of_all_forms_side_by_side(single: bool) -> None:
    packed, rows = mixed()
    keys = ["coded_0", "coded_1", "coded_2", "half", "twin", "bag"]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.ones(6, 8, dtype=torch.int64)
    if not single:
        lengths = torch.randint(0, 4, (6, 8), generator=generator)
    values = [torch.randint(0, len(rows[key]), (int(n.sum()),), generator=generator) for key, n in zip(keys, lengths)]
    out = packed(KeyedJaggedTensor.from_lengths_sync(keys, torch.cat(values), lengths.flatten()))
    assert list(out.keys()) == packed.names
    for key, ids, length in zip(keys, values, lengths):
        expected = torch.stack([part.sum(0) for part in torch.split(rows[key][ids], length.tolist())])
        if key == "bag":
            expected = expected / length.clamp(min=1)[:, None]
        torch.testing.assert_close(out[key], expected, rtol=1e-5, atol=1e-4)


def test_ids_beyond_the_rows_share_one() -> None:
    packed = PackedTables([PackedTable("a", ("a",), 2, rows=4, dropped_to=3)])
    rows = torch.arange(8.0).view(4, 2)
    packed.fill("a", rows)
    out = packed(KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([0, 3, 4, 999]), torch.ones(4).long()))
    assert torch.equal(out.values(), rows[[0, 3, 3, 3]])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_with_a_scale_each(bits: int) -> None:
    """As fbgemm rounds them, to within a step where it rounds the other way, and in as many bytes."""
    torch.manual_seed(0)
    rows = torch.randn(50, 16) * torch.logspace(-3, 1, 50)[:, None]
    packed = PackedTables([PackedTable("a", ("a",), 16, rows=50, rowwise=bits)])  # type: ignore[arg-type]
    packed.fill("a", rows)
    out = packed(KeyedJaggedTensor.from_lengths_sync(["a"], torch.arange(50), torch.ones(50).long())).values()
    step = (rows.max(1).values - rows.min(1).values) / (2**bits - 1)
    # Half a step of rounding; scale and offset are themselves rounded to 11 bits.
    bound = (0.51 * step + rows.abs().max(1).values * 2**-10)[:, None]
    assert ((out - rows).abs() <= bound).all()
    theirs = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows, bits)
    back = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(theirs, bits)
    assert ((out - rows).square().mean() / (back - rows).square().mean()).sqrt() < 1.02
    assert packed.codes()[0].numel() == theirs.numel()


def test_axes_train_and_codes_do_not() -> None:
    packed, _ = mixed()
    keys = packed.names
    out = packed(KeyedJaggedTensor.from_lengths_sync(keys, torch.full((6,), 4), torch.ones(6).long()))
    before = [codes.clone() for codes in packed.codes()]
    torch.autograd.backward(out.values().sum())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in packed.parameters())
    torch.optim.SGD(packed.parameters(), lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, packed.codes()))


def test_the_description_makes_it_again() -> None:
    packed, _ = mixed()
    again = PackedTables(**packed.describe())
    again.load_state_dict(packed.state_dict())
    ids = KeyedJaggedTensor.from_lengths_sync(packed.names, torch.full((6,), 5), torch.ones(6).long())
    assert torch.equal(again(ids).values(), packed(ids).values())


def test_an_embedding_like_any_other() -> None:
    def make(schema: ctr.Schema) -> ctr.TableEmbedding:
        torch.manual_seed(0)
        tables = [
            PackedTable("user", ("user",), 4, rows=15, bits=((4, 4),), dropped_to=2),
            PackedTable("item", ("item",), 4, rows=30, bits=((6, 6, 4),)),
            PackedTable("genres", ("genres",), 4, rows=10, rowwise=8, pooling="mean"),
            PackedTable("history", ("history",), 4, rows=30, bits=((6, 6, 4),), pooling="mean"),
        ]
        packed = PackedTables(tables, names=["user", "item", "genres", "history"])
        packed.fill("user", torch.randint(0, 16, (15, 2)), torch.randn(2, 4), torch.randn(4))
        for name in ("item", "history"):
            packed.fill(name, torch.randint(0, 16, (30, 3)), torch.randn(3, 4), torch.randn(4))
        packed.fill("genres", torch.randn(10, 4))
        return ctr.TableEmbedding(schema.features, embedding_dim=4, tables=packed)

    check_embedding(make)


def test_export_without_control_flow_on_data() -> None:
    features = [Categorical("a", num_embeddings=20), Categorical("b", num_embeddings=30)]
    packed = PackedTables(
        [PackedTable("a", ("a",), 4, rows=20, bits=((8, 8, 8),)), PackedTable("b", ("b",), 4, rows=30, rowwise=4)]
    )
    packed.fill("a", torch.randint(0, 256, (20, 3)), torch.randn(3, 4), torch.randn(4))
    packed.fill("b", torch.randn(30, 4))
    embedding = ctr.TableEmbedding(features, embedding_dim=4, tables=packed)

    class OfIds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = embedding

        def forward(self, ids: Tensor) -> Tensor:
            kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b"], ids.flatten(), torch.ones_like(ids).flatten())
            size = ids.shape[1]
            fields: Tensor = self.embedding(
                ctr.Batch(kjt, torch.zeros(size, 0), torch.zeros(size, 1), torch.ones(size))
            )
            return fields

    ids = torch.stack([torch.arange(8), torch.arange(8) + 20])
    exported = torch.export.export(OfIds(), (ids,)).module()
    assert torch.equal(exported(ids), OfIds()(ids))


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"bits": ((8, 8, 8, 8, 1),)}, "a word at most 32"),
        ({"bits": ((0, 8),)}, "1 to 16 bits"),
        ({"rows": 3, "dropped_to": 3}, "one of the first 3 rows"),
        ({"rowwise": 3}, "rowwise must be 8, 4 or 2"),
        ({"rowwise": 8, "bits": ((8,),)}, "without bits"),
    ],
)
def test_wrong_descriptions(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PackedTable(**{"name": "a", "feature_names": ("a",), "embedding_dim": 4, "rows": 9, **arguments})  # type: ignore[arg-type]


def test_wrong_codes() -> None:
    packed = PackedTables([PackedTable("a", ("a",), 4, rows=2, bits=((4, 4),))])
    axes, offset = torch.zeros(2, 4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"codes must be in \[0, 2\^bits\)"):
        packed.fill("a", torch.tensor([[0, 16], [0, 0]]), axes, offset)
    with pytest.raises(ValueError, match=r"takes codes \(2, 2\)"):
        packed.fill("a", torch.zeros(3, 2).long(), axes, offset)
    with pytest.raises(ValueError, match="no table 'b'"):
        packed.fill("b", torch.zeros(2, 2).long(), axes, offset)
    with pytest.raises(ValueError, match="names="):
        PackedTables(packed.tables, names=["b"])
