"""Tables of a trained model in a few bytes a row: transform coding.

A row is stored as a handful of small integers: coordinates in the principal axes of its table, each in as many bits as
its share of the energy deserves (reverse water-filling; T. Cover and J. Thomas, "Elements of Information Theory",
section 10.3.3). There are no scales per row, which in common int4 and int8 rows take four bytes: the scale of a
coordinate is part of its axis. `ctrlib.search.coding` finds codes and axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.sequence import mean_events, sum_events
from ctrlib.errors import ArgumentError

LARGEST_HALF = 65_504  # of float16


@dataclass(frozen=True)
class PackedTable:
    """How one table is stored.

    `bits`: of each coordinate, by words of 32 bits (a single word may be shorter, 8, 16 or 24 bits, and so may the
    last); no word at all: rows are kept as they are, in float16, or with `rowwise` 8, 4 or 2 as integers of so many
    bits, beside which a row takes 4 bytes for its scale and offset. `rows`: how many of the first rows are there; later
    ids read row `dropped_to`.

    Raises:
        ValueError: bits do not fit, or `dropped_to` is not a row.

    >>> PackedTable("item", feature_names=("item",), embedding_dim=8, rows=100, bits=((6, 4, 3, 3),)).row_bytes
    2
    """

    name: str
    feature_names: tuple[str, ...]
    embedding_dim: int
    rows: int
    bits: tuple[tuple[int, ...], ...] = ()
    rowwise: Literal[0, 2, 4, 8] = 0
    pooling: Literal["sum", "mean"] = "sum"
    dropped_to: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_names", tuple(self.feature_names))
        object.__setattr__(self, "bits", tuple(tuple(word) for word in self.bits))
        if any(not 1 <= bits <= 16 for word in self.bits for bits in word) or any(sum(word) > 32 for word in self.bits):
            raise ArgumentError(
                f"table {self.name!r}: a coordinate takes 1 to 16 bits and a word at most 32, got {self.bits}"
            )
        if self.rowwise not in (0, 2, 4, 8) or (self.rowwise and self.bits):
            raise ArgumentError(f"table {self.name!r}: rowwise must be 8, 4 or 2, without bits, got {self.rowwise}")
        if not 0 <= self.dropped_to < self.rows:
            raise ArgumentError(
                f"table {self.name!r}: dropped_to={self.dropped_to} must be one of the first {self.rows} rows"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        if self.rowwise:
            return 4 + -(-self.embedding_dim * self.rowwise // 8)
        if not self.bits:
            return 2 * self.embedding_dim
        return 4 * (len(self.bits) - 1) + -(-sum(self.bits[-1]) // 8)


class PackedTables(nn.Module):
    """e_v = sum_j q_vj a_j + b: q_v the integers stored for id v, a_j axes with their scales, b an offset.

    Takes the place of a trained TorchRec EmbeddingBagCollection: KeyedJaggedTensor -> KeyedTensor with the same keys
    and widths. Codes are fixed, axes and offset parameters, which can be trained on; bags are decoded, then pooled.

    >>> packed = PackedTables([PackedTable("item", ("item",), embedding_dim=3, rows=5, bits=((4, 4),))])
    >>> packed.fill("item", torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]), torch.eye(3)[:2], torch.zeros(3))
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([4, 8]), torch.tensor([1, 1]))
    >>> packed(kjt).values().tolist()
    [[9.0, 10.0, 0.0], [1.0, 2.0, 0.0]]
    """

    def __init__(
        self, tables: Sequence[PackedTable | Mapping[str, Any]], *, names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.tables = [table if isinstance(table, PackedTable) else PackedTable(**table) for table in tables]
        # Tables with rows of one form are looked up and decoded together.
        groups: dict[tuple[type[_Group], int, int], list[PackedTable]] = {}
        for table in self.tables:
            form = _Coded if table.bits else RoundedRows if table.rowwise else _Half
            groups.setdefault((form, table.row_bytes, table.embedding_dim), []).append(table)
        self.groups = nn.ModuleList(form(members) for (form, _, _), members in groups.items())
        held = {name: table.embedding_dim for table in self.tables for name in table.feature_names}
        self.names = sorted(held) if names is None else list(names)
        if sorted(self.names) != sorted(held):
            raise ArgumentError(f"names={self.names}, but the tables are those of {sorted(held)}")
        self.widths = [held[name] for name in self.names]
        self.embedding_dim = self.widths[0] if len(set(self.widths)) == 1 else None

    def fill(self, table: str, codes: Tensor, axes: Tensor | None = None, offset: Tensor | None = None) -> None:
        """Store a table: codes (rows, J) with axes (J, D) and offset (D,), or, without bits, the rows (rows, D).

        Raises:
            ValueError: there is no such table, or a shape or a code does not fit.
        """
        for group in self.parts():
            for place, member in enumerate(group.members):
                if member.name == table:
                    with torch.no_grad():
                        group.fill(place, codes, axes, offset)
                    return
        raise ArgumentError(f"no table {table!r}, expected one of {[member.name for member in self.tables]}")

    def codes(self) -> list[Tensor]:
        """The tensors that hold the rows."""
        return [tensor for group in self.parts() for name, tensor in group.named_buffers() if name in group.stored]

    def describe(self) -> dict[str, Any]:
        """What the constructor takes, in plain data."""
        return {"tables": [dataclasses.asdict(table) for table in self.tables], "names": self.names}

    def parts(self) -> list[_Group]:
        """Tables of one form each, which are looked up together."""
        return cast("list[_Group]", list(self.groups))

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        fields = {name: field for group in self.parts() for name, field in zip(group.keys, group(ids))}
        return KeyedTensor(self.names, self.widths, torch.cat([fields[name] for name in self.names], dim=1))


class _Group(nn.Module):
    """Tables with rows of one form, one below the other."""

    def __init__(self, members: Sequence[PackedTable]) -> None:
        super().__init__()
        self.members = list(members)
        self.embedding_dim = members[0].embedding_dim
        self.first_rows = [sum(member.rows for member in members[:place]) for place in range(len(members) + 1)]
        self.places = [place for place, member in enumerate(members) for _ in member.feature_names]
        self.keys = [name for member in members for name in member.feature_names]
        self.stored: list[str] = []  # names of the tensors that hold rows
        limits = [[self.first_rows[p], members[p].rows, members[p].dropped_to] for p in self.places]
        self.limits: Tensor
        self.register_buffer("limits", torch.tensor(limits).view(-1, 3, 1), persistent=False)

    def fill(self, place: int, codes: Tensor, axes: Tensor | None, offset: Tensor | None) -> None:
        """Store the rows of one of the members."""
        raise NotImplementedError

    def rows_of(self, ids: Tensor, features: slice | list[int]) -> Tensor:
        """Where the ids (F, N) are stored."""
        first, rows, dropped = self.limits[features].unbind(1)
        return torch.where(ids < rows, ids, dropped) + first

    def look_up(self, ids: Tensor, features: slice | list[int]) -> Tensor:
        """Ids (F, N) -> (F, N, D)."""
        raise NotImplementedError

    def forward(self, ids: KeyedJaggedTensor) -> Sequence[Tensor]:
        """KeyedJaggedTensor -> (B, D) for each of `keys`."""
        keys, size = ids.keys(), ids.stride()
        # torch.export knows nothing of how many ids a bag holds.
        counted = not torch.compiler.is_compiling() and ids.values().numel() == len(keys) * size
        if counted and bool((ids.lengths() == 1).all()):
            rows = ids.values().view(len(keys), size)
            if keys != self.keys:
                rows = rows[[keys.index(key) for key in self.keys]]
            return self.look_up(rows, slice(None)).unbind(0)
        return [self.pool(place, ids[key].values(), ids[key].offsets()) for place, key in enumerate(self.keys)]

    def pool(self, place: int, ids: Tensor, offsets: Tensor) -> Tensor:
        """Bags of the feature at `place` of `keys`: ids (N,), offsets (B + 1,) -> (B, D)."""
        vectors = self.look_up(ids[None], slice(place, place + 1))[0]
        is_mean = self.members[self.places[place]].pooling == "mean"
        return (mean_events if is_mean else sum_events)(vectors, offsets)


class _Half(_Group):
    """Rows in float16."""

    def __init__(self, members: Sequence[PackedTable]) -> None:
        super().__init__(members)
        self.rows: Tensor
        self.stored = ["rows"]
        self.register_buffer("rows", torch.zeros(self.first_rows[-1], self.embedding_dim, dtype=torch.float16))

    def fill(self, place: int, codes: Tensor, axes: Tensor | None, offset: Tensor | None) -> None:
        check_half(self.members[place].name, codes)
        self.rows[self.first_rows[place] : self.first_rows[place + 1]] = codes.to(torch.float16)

    def look_up(self, ids: Tensor, features: slice | list[int]) -> Tensor:
        """Ids (F, N) -> (F, N, D)."""
        return self.rows[self.rows_of(ids, features)].float()


def check_half(name: str, rows: Tensor) -> None:
    """Refuse rows that float16 has no numbers for.

    Raises:
        ArgumentError: as said.
    """
    if not (rows.abs() <= LARGEST_HALF).all():
        raise ArgumentError(
            f"table {name!r} has numbers of up to {rows.abs().max().item():,.0f}, and float16, which rounded rows and "
            f"their scales are in, ends at {LARGEST_HALF:,}: leave this table as it is, or train with smaller rows"
        )


class RoundedRows(_Group):
    """Rows of integers, each with a scale and an offset of its own in float16: fbgemm's common form."""

    def __init__(self, members: Sequence[PackedTable]) -> None:
        super().__init__(members)
        self.bits = members[0].rowwise
        self.rows: Tensor
        self.stored = ["rows"]
        self.register_buffer("rows", torch.zeros(self.first_rows[-1], members[0].row_bytes, dtype=torch.uint8))
        self.ends: Tensor | None
        self.register_buffer("ends", None)

    def fill(self, place: int, codes: Tensor, axes: Tensor | None, offset: Tensor | None) -> None:
        """Store the rows of one of the members."""
        check_half(self.members[place].name, codes)
        low, high = codes.min(1).values, codes.max(1).values
        # As they will be read back.
        low = low.half().float()
        scale = ((high - low) / (2**self.bits - 1)).half().float()
        integers = ((codes - low[:, None]) / scale.clamp(min=1e-12)[:, None]).round().clamp(0, 2**self.bits - 1).long()
        per_byte = 8 // self.bits
        integers = nn.functional.pad(integers, (0, -integers.shape[1] % per_byte)).view(len(codes), -1, per_byte)
        packed = (integers << (self.bits * torch.arange(per_byte))).sum(2).to(torch.uint8)
        ends = torch.stack([scale, low], 1).half().view(torch.uint8)
        self.rows[self.first_rows[place] : self.first_rows[place + 1]] = torch.cat([packed, ends], 1)

    def look_up(self, ids: Tensor, features: slice | list[int]) -> Tensor:
        """Ids (F, N) -> (F, N, D)."""
        places = self.rows_of(ids, features)
        rows = self.rows[places]
        if self.ends is None:
            rows, ends = rows[..., :-4], rows[..., -4:].clone(memory_format=torch.contiguous_format).view(torch.float16)
        else:
            ends = self.ends[places]
        scale, low = ends.float().unsqueeze(-1).unbind(-2)
        if self.bits < 8:
            shifts = self.bits * torch.arange(8 // self.bits, dtype=torch.uint8, device=rows.device)
            rows = (rows.unsqueeze(-1) >> shifts & (2**self.bits - 1)).flatten(-2)
        return rows[..., : self.embedding_dim].float() * scale + low

    def split(self) -> None:
        """Keep scales and offsets apart from the integers, in place: as many bytes in two tensors.

        For runtimes that cannot read two bytes as a float16. What is saved has them in one.
        """
        if self.ends is None:
            self.ends = self.rows[:, -4:].contiguous().view(torch.float16)
            self.rows = self.rows[:, :-4].contiguous()


class _Coded(_Group):
    """Rows as words of 32 bits, the last maybe shorter, with the first coordinate of a word in its lowest bits.

    Words are kept in planes, a tensor of 4, 2 or 1 bytes for each row, since reading a number at a random place is
    much faster than copying a few bytes from there; a word of 3 bytes has two planes.
    """

    def __init__(self, members: Sequence[PackedTable]) -> None:
        super().__init__(members)
        rest = members[0].row_bytes % 4
        self.num_words = len(members[0].bits)
        dtypes = [torch.int32] * (members[0].row_bytes // 4)
        dtypes += [torch.int16] * (rest // 2) + [torch.uint8] * (rest % 2)
        self.stored = [f"plane_{number}" for number in range(len(dtypes))]
        for number, dtype in enumerate(dtypes):
            self.register_buffer(f"plane_{number}", torch.zeros(self.first_rows[-1], dtype=dtype))
        self.axes = nn.ParameterList(
            torch.zeros(sum(len(word) for word in member.bits), self.embedding_dim) for member in members
        )
        self.offset = nn.Parameter(torch.zeros(len(members), self.embedding_dim))
        # Axes are kept for codes in [0, 1), so that they are of the size of the rows, and optimisers can move them.
        for place, member in enumerate(members):
            exponents = torch.tensor([[-float(bits)] for word in member.bits for bits in word])
            self.register_buffer(f"units_{place}", exponents.exp2(), persistent=False)
        # Of each word: (tables, coordinates, 1), how far to shift and what to keep; 0 where a table has none.
        self.widths = [max(len(member.bits[word]) for member in members) for word in range(self.num_words)]
        for word, width in enumerate(self.widths):
            shifts = torch.zeros(len(members), width, 1, dtype=torch.int32)
            masks = torch.zeros(len(members), width, 1, dtype=torch.int32)
            for place, member in enumerate(members):
                for coordinate, bits in enumerate(member.bits[word]):
                    shifts[place, coordinate] = sum(member.bits[word][:coordinate])
                    masks[place, coordinate] = 2**bits - 1
            self.register_buffer(f"shifts_{word}", shifts[self.places], persistent=False)
            self.register_buffer(f"masks_{word}", masks[self.places], persistent=False)

    def fill(self, place: int, codes: Tensor, axes: Tensor | None, offset: Tensor | None) -> None:
        member = self.members[place]
        bits = [bits for word in member.bits for bits in word]
        if axes is None or offset is None or codes.shape != (member.rows, len(bits)):
            raise ArgumentError(
                f"table {member.name!r} takes codes ({member.rows}, {len(bits)}), axes and an offset, got codes "
                f"{tuple(codes.shape)}"
            )
        if (codes < 0).any() or (codes >= 2 ** torch.tensor(bits)).any():
            raise ArgumentError(f"table {member.name!r}: codes must be in [0, 2^bits), bits {member.bits}")
        rows = slice(self.first_rows[place], self.first_rows[place + 1])
        used = 0
        for number, word in enumerate(member.bits):
            shifts = torch.tensor([sum(word[:coordinate]) for coordinate in range(len(word))])
            value = (codes[:, used : used + len(word)].long() << shifts).sum(1)
            used += len(word)
            plane = self.get_buffer(f"plane_{number}")
            plane[rows] = value.to(plane.dtype)  # keeps the lowest bits
            if f"plane_{number + 1}" in self._buffers and number + 1 == self.num_words:
                self.get_buffer(f"plane_{number + 1}")[rows] = (value >> 16).to(torch.uint8)
        self.axes[place].copy_(axes / self.get_buffer(f"units_{place}"))
        self.offset[place] = offset

    def look_up(self, ids: Tensor, features: slice | list[int]) -> Tensor:
        """Ids (F, N) -> (F, N, D)."""
        places = self.rows_of(ids, features).flatten()
        numbers = []
        for word in range(self.num_words):
            value = self.get_buffer(f"plane_{word}")[places].int()
            if f"plane_{word + 1}" in self._buffers and word + 1 == self.num_words:
                value = (value & 0xFFFF) | (self.get_buffer(f"plane_{word + 1}")[places].int() << 16)
            value = value.view(ids.shape[0], 1, -1) >> self.get_buffer(f"shifts_{word}")[features]
            numbers.append(value.bitwise_and_(self.get_buffer(f"masks_{word}")[features]).float())
        coordinates = numbers[0] if len(numbers) == 1 else torch.cat(numbers, dim=1)
        axes = torch.stack([self._spread(place) for place in range(len(self.members))])[self.places][features]
        return torch.baddbmm(self.offset[self.places][features].unsqueeze(1), coordinates.transpose(1, 2), axes)

    def _spread(self, place: int) -> Tensor:
        """The axes of a table (J, D), with zeros where others of the group have more coordinates in a word."""
        axes = self.axes[place] * self.get_buffer(f"units_{place}")
        parts = axes.split([len(word) for word in self.members[place].bits])
        return torch.cat([nn.functional.pad(part, (0, 0, 0, w - len(part))) for part, w in zip(parts, self.widths)])
