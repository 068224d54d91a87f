"""Behaviour histories as fields: what was clicked before, encoded with a view to what may be clicked now.

An *encoder* makes one vector of a history: `MeanPooling` here, `DIN`, `BST` and `SIM` in files of their own. All take
and give the same, so each can stand in for another, and any module of yours that keeps to it can too:

    forward(target (B, C), values (N, C), offsets (B + 1)) -> (B, C);  in_shape and out_shape are (C,)

`values` are the events of all rows one after the other (jagged): row b's, oldest first, are
`values[offsets[b]:offsets[b + 1]]`. There is no padding, so no mask to forget, and an event costs the same whether
its neighbours are many or few. The vector of an empty history is zero.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from ctrlib.batch import Batch
from ctrlib.embeddings.table import TableEmbedding, by_vocabulary, init_rows, num_rows, table_name
from ctrlib.errors import ArgumentError
from ctrlib.losses import add_auxiliary
from ctrlib.schema import (
    NUM_RESERVED_IDS,
    PADDING_ID,
    Categorical,
    Feature,
    Numeric,
    Sequence,
    SparseFeature,
    vocabulary_of,
)


class MeanPooling(nn.Module):
    """u = 1/L sum_j k_j: the floor, blind to the target.

    Shape: target (B, C), values (N, C), offsets (B + 1) -> (B, C).

    >>> pool = MeanPooling(2)
    >>> pool(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 2, 2])).tolist()
    [[2.0, 3.0], [0.0, 0.0]]
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_shape = self.out_shape = (dim,)

    def forward(self, target_BC: Tensor, values_NC: Tensor, offsets: Tensor) -> Tensor:
        """Histories -> (B, C); the target is not looked at."""
        return mean_events(values_NC, offsets)


@dataclass(frozen=True)
class Unit:
    """What is compared with what: k targets, the k histories of the same things, and the encoder of both.

    Item and category are side features of *one* event: their vectors are concatenated (C = k * D), and what the
    encoder makes of them fills the fields of the k histories. `same`: a target whose id an event must share in order
    to count at all, the hard search of SIM (Pi et al., CIKM 2020, https://arxiv.org/abs/2006.05639). Values that train
    does not know, and missing ones, are the same as nothing.
    """

    targets: tuple[str, ...]
    histories: tuple[str, ...]
    encoder: nn.Module
    same: str | None = None


class SequenceEmbedding(nn.Module):
    """As `TableEmbedding`, but each unit's histories become fields by the unit's encoder, in the light of its targets.

    Features of one vocabulary share one table: a target's own field and its history read the same rows. Vocabularies
    of the units live in an `EmbeddingCollection`, all others in the tables of `TableEmbedding`. A bag or history that
    shares a unit's vocabulary without being one of its histories is pooled as its feature says.

    `stacked` and `numeric` are for the features outside the units, as in `TableEmbedding`.
    `row_losses`: vocabulary -> module from (rows (N, D), ids (N,)) to a scalar, which the engines add to the loss in
    training; N counts all look-ups of the batch. See `MiniBatchAwareL2` in `din.py`.

    Shape: Batch -> (B, F, D), fields in the schema's order.

    Raises:
        ValueError: a unit names features that are not there or do not belong together, or its encoder has another
            width than the unit; when called: histories of one unit differ in length.

    >>> item = Categorical("item", num_embeddings=9)
    >>> clicks = Sequence("clicks", vocabulary="item", num_embeddings=9)
    >>> unit = Unit(("item",), ("clicks",), MeanPooling(4))
    >>> SequenceEmbedding([item, clicks, Numeric("price")], units=[unit], embedding_dim=4).out_shape
    (3, 4)
    """

    def __init__(
        self,
        features: Iterable[Feature],
        *,
        units: Iterable[Unit],
        embedding_dim: int = 16,
        init_std: float = 1e-4,
        row_losses: Mapping[str, nn.Module] | None = None,
        stacked: int = 0,
        numeric: nn.Module | None = None,
    ) -> None:
        super().__init__()
        features, units = tuple(features), tuple(units)
        _check_units(features, units, embedding_dim)
        self.out_shape = (len(features), embedding_dim)
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        in_units = {name for unit in units for name in (*unit.targets, *unit.histories)}
        vocabularies = {vocabulary_of(feature) for feature in sparse if feature.name in in_units}
        events = [feature for feature in sparse if vocabulary_of(feature) in vocabularies]
        rest = [feature.name for feature in features if feature not in events]

        self.tables = make_event_tables(events, embedding_dim=embedding_dim, init_std=init_std)
        self.rest: nn.Module | None = None
        if rest or numeric is not None:
            self.rest = TableEmbedding(
                features, only=rest, embedding_dim=embedding_dim, init_std=init_std, stacked=stacked, numeric=numeric
            )
        self.units = [(unit.targets, unit.histories, unit.same) for unit in units]
        self.encoders = nn.ModuleList(unit.encoder for unit in units)
        self.names = [feature.name for feature in events]
        histories = {name for unit in units for name in unit.histories}
        self.pooled = {
            feature.name: feature.pooling
            for feature in events
            if not isinstance(feature, Categorical) and feature.name not in histories
        }
        # The schema's order: names of fields looked up here, and runs of fields from `rest`.
        self.order: list[str | slice] = []
        start = 0
        for is_here, run in itertools.groupby(features, key=lambda feature: feature in events):
            names = [feature.name for feature in run]
            self.order += names if is_here else [slice(start, start + len(names))]
            start += 0 if is_here else len(names)

        row_losses = row_losses or {}
        if unknown := row_losses.keys() - vocabularies:
            raise ArgumentError(
                f"row_losses are for {sorted(unknown)}, but the units look up {sorted(vocabularies)}: name one of these"
            )
        self.row_losses = nn.ModuleList(row_losses.values())
        self._members = [[f.name for f in events if vocabulary_of(f) == vocabulary] for vocabulary in row_losses]

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, F, D)."""
        dim = self.out_shape[1]
        looked_up = self.tables(batch.sparse)
        ids = batch.sparse.to_dict()
        fields = {name: looked_up[name].values() for name in self.names}
        if self.training:
            for row_loss, members in zip(self.row_losses, self._members):
                rows = torch.cat([fields[name] for name in members])
                add_auxiliary(row_loss(rows, torch.cat([ids[name].values() for name in members])))

        for (targets, histories, same), encoder in zip(self.units, self.encoders):
            offsets = _common_offsets(ids, histories)
            # True already; said for torch.export, which knows nothing of how many ids a batch holds.
            counts = [(fields[name].shape[0], batch.size) for name in targets]
            counts += [(fields[name].shape[0], fields[histories[0]].shape[0]) for name in histories[1:]]
            for count, expected in counts:
                torch._check(count == expected)  # type: ignore[no-untyped-call]
            target_BC = torch.cat([fields[name] for name in targets], dim=1)
            values_NC = torch.cat([fields.pop(name) for name in histories], dim=1)
            if same is not None:
                of_event = ids[histories[targets.index(same)]].values()
                of_target = to_events(ids[same].values(), offsets, of_event.shape[0])
                known = of_event >= NUM_RESERVED_IDS  # of two unknown values, nobody knows whether they are the same
                values_NC, offsets = keep_events(values_NC, offsets, known & (of_event == of_target))
            encoded = encoder(target_BC, values_NC, offsets).to(values_NC.dtype)
            fields |= zip(histories, encoded.split(dim, dim=1))
        for name, pooling in self.pooled.items():
            offsets = ids[name].offsets()
            fields[name] = (mean_events if pooling == "mean" else sum_events)(fields[name], offsets)

        rest: Any = None if self.rest is None else self.rest(batch)
        parts = [fields[run].unsqueeze(1) if isinstance(run, str) else rest[:, run] for run in self.order]
        return torch.cat(parts, dim=1)


def make_event_tables(features: Iterable[SparseFeature], *, embedding_dim: int, init_std: float) -> EmbeddingCollection:
    """One table per vocabulary, its rows looked up one by one: pooling is for an encoder to do.

    Raises:
        ValueError: a feature has not been fitted.
    """
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=table_name(vocabulary_of(members[0])),
                num_embeddings=num_rows(members),
                embedding_dim=embedding_dim,
                feature_names=[member.name for member in members],
                init_fn=functools.partial(init_rows, std=init_std, copies=1, padding=[PADDING_ID]),
            )
            for members in by_vocabulary(list(features))
        ]
    )


def to_events(x: Tensor, offsets: Tensor, num_events: int) -> Tensor:
    """Each row's entry, repeated for each of its events: (B, ...) -> (N, ...).

    >>> to_events(torch.tensor([7.0, 8.0, 9.0]), torch.tensor([0, 2, 2, 3]), 3).tolist()
    [7.0, 7.0, 9.0]
    """
    repeated: Tensor = _ToEvents.apply(x, offsets, num_events)  # type: ignore[no-untyped-call]
    return repeated


def sum_events(values_NC: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each row's events: (N, C) -> (B, C).

    >>> sum_events(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 2, 2, 3])).tolist()
    [[3.0], [0.0], [5.0]]
    """
    summed: Tensor = _SumEvents.apply(values_NC, offsets)  # type: ignore[no-untyped-call]
    return summed


def mean_events(values_NC: Tensor, offsets: Tensor) -> Tensor:
    """The mean of each row's events, 0 where there are none: (N, C) -> (B, C)."""
    return sum_events(values_NC, offsets) / offsets.diff().clamp(min=1).unsqueeze(1)


def softmax_events(scores_NH: Tensor, offsets: Tensor) -> Tensor:
    """Softmax over each row's events, for each of H columns: (N, H) -> (N, H).

    >>> softmax_events(torch.tensor([[1.0], [1.0], [5.0]]), torch.tensor([0, 2, 2, 3])).tolist()
    [[0.5], [0.5], [1.0]]
    """
    num_events = scores_NH.shape[0]
    rows = to_events(torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets, num_events)
    # Any shift common to a row leaves its softmax as it is, so none of this needs a gradient.
    peak_BH = scores_NH.new_full((offsets.shape[0] - 1, scores_NH.shape[1]), -torch.inf)
    index_NH = rows.unsqueeze(1).expand_as(scores_NH)
    peak_BH = peak_BH.scatter_reduce(0, index_NH, scores_NH.detach(), "amax")
    weights_NH = (scores_NH - to_events(peak_BH, offsets, num_events)).exp()
    return weights_NH / to_events(sum_events(weights_NH, offsets), offsets, num_events)


def keep_events(values_NC: Tensor, offsets: Tensor, keep_N: Tensor) -> tuple[Tensor, Tensor]:
    """The events where `keep_N` is true, in their order, and the offsets that go with them.

    >>> values, offsets = keep_events(torch.eye(3), torch.tensor([0, 2, 3]), torch.tensor([True, False, True]))
    >>> values.argmax(1).tolist(), offsets.tolist()
    ([0, 2], [0, 1, 2])
    """
    kept_before = F.pad(keep_N.cumsum(0), (1, 0))
    return values_NC[keep_N], kept_before[offsets]


def _repeat(x: Tensor, offsets: Tensor, num_events: int) -> Tensor:
    # N is given, since working it out from the offsets would wait for the device, and so that it can stay symbolic.
    return x.repeat_interleave(offsets.diff(), dim=0, output_size=num_events)


def _sum(values_NC: Tensor, offsets: Tensor) -> Tensor:
    every = torch.arange(values_NC.shape[0], dtype=offsets.dtype, device=offsets.device)
    return F.embedding_bag(every, values_NC.contiguous(), offsets, mode="sum", include_last_offset=True)


class _ToEvents(torch.autograd.Function):
    """Repeating and summing are each other's gradient; what autograd does instead takes several times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, num_events: int) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.shape = x.shape[1:]
        return _repeat(x, offsets, num_events)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _sum(grad.flatten(1), offsets).view(-1, *ctx.shape), None, None


class _SumEvents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NC: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.num_events = values_NC.shape[0]
        return _sum(values_NC, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (offsets,) = ctx.saved_tensors
        return _repeat(grad, offsets, ctx.num_events), None


def _common_offsets(ids: dict[str, Any], histories: tuple[str, ...]) -> Tensor:
    offsets: Tensor = ids[histories[0]].offsets()
    for name in histories[1:]:
        if not torch.compiler.is_compiling() and not torch.equal(ids[name].offsets(), offsets):
            raise ArgumentError(
                f"histories {histories[0]!r} and {name!r} belong to one unit, but differ in length in some row: make "
                "one entry in both for each event (give both the same max_length), or put them in units of their own"
            )
    return offsets


def _check_units(features: tuple[Feature, ...], units: tuple[Unit, ...], dim: int) -> None:
    if not units:
        raise ArgumentError("SequenceEmbedding needs one or more units, got none: give a Unit, or use TableEmbedding")
    by_name = {feature.name: feature for feature in features}
    for unit in units:
        what = f"unit of targets {unit.targets} and histories {unit.histories}"
        if not all(isinstance(names, tuple) for names in (unit.targets, unit.histories)):
            raise ArgumentError(f"{what}: expected tuples of names; write ('item',) for one name")
        if len(unit.targets) != len(unit.histories) or not unit.targets:
            raise ArgumentError(f"{what}: expected one history for each of one or more targets")
        for target, history in zip(unit.targets, unit.histories):
            a, b = by_name.get(target), by_name.get(history)
            if not isinstance(a, Categorical) or not isinstance(b, Sequence):
                raise ArgumentError(
                    f"{what}: expected a Categorical target and a Sequence, got {type(a).__name__} {target!r} and "
                    f"{type(b).__name__} {history!r} (NoneType: no such feature)"
                )
            if vocabulary_of(a) != vocabulary_of(b):
                raise ArgumentError(
                    f"{what}: {target!r} and {history!r} have vocabularies {vocabulary_of(a)!r} and "
                    f"{vocabulary_of(b)!r}, expected the same: prepare with Sequence({history!r}, "
                    f"vocabulary={vocabulary_of(a)!r})"
                )
        if unit.same is not None and unit.same not in unit.targets:
            raise ArgumentError(f"{what}: same={unit.same!r} is not among the targets")
        width = (dim * len(unit.targets),)
        shapes = [getattr(unit.encoder, name, None) for name in ("in_shape", "out_shape")]
        if shapes != [width, width]:
            raise ArgumentError(
                f"{what}: {len(unit.targets)} vectors of width {dim} make {width}, but {type(unit.encoder).__name__} "
                f"publishes in_shape {shapes[0]} and out_shape {shapes[1]}: build it for {width[0]}"
            )
    histories = [name for unit in units for name in unit.histories]
    if twice := sorted({name for name in histories if histories.count(name) > 1}):
        raise ArgumentError(f"histories {twice} are in several units, but each fills one field: use each once")
