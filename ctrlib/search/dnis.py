"""DNIS: which dimensions frequent and rare values deserve. W. Cheng, Y. Shen and L. Huang, "Differentiable Neural Input
Search for Recommender Systems", 2020, https://arxiv.org/abs/2006.04466 (AutoSrh, TKDE 2023).

The values of all vocabularies, ranked together by how often train has them, form L blocks; e~_v = E_v * alpha_b(v) with
a weight alpha_bk in [0, 1] for each block and dimension. Tables and network are trained first, with alpha = 1. Then, by
turns, a batch of train moves the tables, and a batch of validation moves alpha at the new tables (first order): by its
gradient, which is divided by its mean size in the block, since rare values' gradients are next to nothing. In the end
the dimensions that matter least are dropped, block by block, and alpha is multiplied into the rows.

Where this differs from the paper and its code:

* Whole columns of a block are dropped, four at a time, and not single numbers, each of which would need an index.
  What matters is |alpha| times the root mean square of the column: alpha by itself says nothing, as (c E, alpha / c) is
  the same model, and the code ranks by |E|. As in the paper one threshold serves all blocks, set by a budget of bytes.
  All rows count alike. Where the most frequent block is dropped since its numbers are small, rows that are read more
  often may count for more (`frequency_power`). On Frappe that is worse: validation AUC at 82 % and 25 % of the bytes
  .9854 and .9582, with counts to the power 1/4 .9845 and .9237; on MovieLens-1M the choice is the same.
* lambda is added to the gradient after this was normalised. Added before, as in the code, its weight is
  lambda / mean |g|, and rare blocks are pushed to 0 whatever they are worth (`normalise="task_and_penalty"`).
* Frequencies are those of train alone, and an epoch is one over train, with as many batches of validation, over and
  over, as it takes (the code ends both with the shorter).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.batch import Batch
from ctrlib.data.loader import Loader
from ctrlib.data.vocabulary import check_order
from ctrlib.embeddings.blocks import BlockedVocabulary, BlockTables
from ctrlib.errors import ArgumentError
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS, vocabulary_of
from ctrlib.search.bytes import bytes_of
from ctrlib.search.counting import count_reads
from ctrlib.search.plan import Plan
from ctrlib.search.stages import identity_of, refuse_several_processes, search_epochs, without_end
from ctrlib.structure import put, with_plain_tables
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.exact import ExactEngine
from ctrlib.training.loop import NonFiniteLossError, fit

Normalise = Literal["task", "task_and_penalty", "none"]
PATH = "embedding.tables"


@dataclass(frozen=True)
class DNIS:
    """How to search; the paper's values in brackets.

    Raises:
        ValueError: a value is out of its range.
    """

    ratio: float = 4.0
    """How many times fewer bytes all embeddings are to take, wide part, vectors of numbers and index lists included;"""
    num_bytes: int | None = None
    """or how many they may take."""
    blocks: int | Sequence[float] = 6
    """Blocks of equally many values [10, 20], or the share of the values in each, the most frequent first."""
    warm_epochs: int = 20
    """At most, of training with alpha = 1 [20]; 0 if the model is trained already."""
    epochs: int = 5
    """Of the search."""
    learning_rate: float = 1e-3
    """Adam's, of the weights [1e-3]."""
    alpha_learning_rate: float = 1e-2
    """Of alpha's plain gradient descent [1e-2]: about what an alpha moves in a step."""
    penalty: float = 0.0
    """lambda, of the sum of |alpha| [1e-5]: beside a task's gradient of mean size 1."""
    normalise: Normalise = "task"
    """Each block's gradient: the task's, before the penalty is added; both, as in the code; or none."""
    frequency_power: float = 0.0
    """A row counts for what matters by how often train reads it, to this power: 0, all rows alike, as in the paper; 1,
    by the squared change of all that is looked up."""
    embedding_l2: float = 0.0
    """L2 on whole tables."""

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, int):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        for name, least in (
            ("num_bytes", 1),
            ("warm_epochs", 0),
            ("epochs", 1),
            ("learning_rate", 0),
            ("alpha_learning_rate", 0),
            ("penalty", 0),
            ("frequency_power", 0),
            ("embedding_l2", 0),
        ):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ArgumentError(f"DNIS: {name} must be {least} or more, got {value}")
        if not self.ratio > 1:
            raise ArgumentError(f"DNIS: ratio must be more than 1, got {self.ratio}")
        if self.normalise not in get_args(Normalise):
            raise ArgumentError(f"DNIS: normalise={self.normalise!r}, expected one of {get_args(Normalise)}")
        if min(self.shares, default=0) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ArgumentError(
                f"DNIS: blocks={self.blocks}, expected how many there are, or shares above 0 with the sum 1"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each block, the share of all values."""
        if not isinstance(self.blocks, int):
            return tuple(self.blocks)
        return (1 / self.blocks,) * self.blocks if self.blocks > 0 else ()


class SoftBlocks(nn.Module):
    """e_f = sum_j E_f[x_fj] * alpha_b(x_fj) over the bag x_f, or its mean: what DNIS searches through.

    `ends`: name of each table -> where the ids of each block end. `alpha` (L, D), all 1 at first, is a buffer: no
    engine trains it. All rows are weighted at every step, which costs as much as the tables are large, as dense Adam
    does.

    Shape: KeyedJaggedTensor -> KeyedTensor, the keys and widths of `tables`.
    """

    alpha: Tensor

    def __init__(self, tables: EmbeddingBagCollection, ends: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.tables = tables
        self.blocks = {name: block_of(ends[name]) for name in tables.embedding_bags}
        num_blocks = len(next(iter(ends.values())))
        self.register_buffer("alpha", torch.ones(num_blocks, tables.embedding_bag_configs()[0].embedding_dim))

    def rows(self) -> dict[str, Tensor]:
        """The weighted tables: name -> E * alpha (rows, D)."""
        return {name: bag.weight * self.alpha[self.blocks[name]] for name, bag in self.tables.embedding_bags.items()}

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        weighted = {f"embedding_bags.{name}.weight": rows for name, rows in self.rows().items()}
        pooled: KeyedTensor = functional_call(self.tables, weighted, (kjt,))
        return pooled


def block_of(ends: Sequence[int]) -> Tensor:
    """The block of each id: (rows,).

    >>> block_of([4, 4, 6]).tolist()
    [0, 0, 0, 0, 2, 2]
    """
    sizes = torch.tensor([0, *ends]).diff()
    return torch.arange(len(ends)).repeat_interleave(sizes)


def frequency_blocks(counts: Mapping[str, Tensor], shares: Sequence[float]) -> dict[str, tuple[int, ...]]:
    """Where each block ends in each vocabulary, all values ranked together by their counts: name -> id after the last.

    Of equal counts the earlier vocabulary's comes first, so that values that train lacks are in the last block. Inside
    a vocabulary the order of ids is the order of rank. Reserved ids are in the first block, and are not counted.

    Shape: counts (rows,) for each vocabulary.

    >>> counts = {"user": torch.tensor([0, 0, 0, 9, 2, 2]), "item": torch.tensor([0, 0, 0, 5, 2, 0])}
    >>> frequency_blocks(counts, shares=(0.5, 0.5))
    {'user': (5, 6), 'item': (4, 6)}
    """
    # A value may have been counted more often than one with a lower id (in bags that were cut, say): ranks keep to ids.
    values = [torch.cummin(count[NUM_RESERVED_IDS:], dim=0).values for count in counts.values()]
    order = torch.cat(values).argsort(descending=True, stable=True)
    owner = torch.arange(len(values)).repeat_interleave(torch.tensor([len(count) for count in values]))[order]
    cuts = [round(share * len(order)) for share in itertools.accumulate(shares)]
    cuts[-1] = len(order)
    ends = torch.stack([torch.bincount(owner[:cut], minlength=len(values)) for cut in cuts], dim=1) + NUM_RESERVED_IDS
    return {name: tuple(row) for name, row in zip(counts, ends.tolist())}


def alpha_step(alpha: Tensor, gradient: Tensor, settings: DNIS) -> Tensor:
    """The next alpha: clamp(alpha - rate g, 0, 1), with g_l = g_l / (mean_k |g_lk| + 1e-8) in every block l, plus
    lambda sign(alpha).

    Shape: alpha (L, D), gradient of the validation loss (L, D) -> (L, D).

    >>> alpha_step(torch.ones(2, 2), torch.tensor([[3e-4, 1e-4], [0.0, 0.0]]), DNIS(alpha_learning_rate=0.1))
    tensor([[0.8500, 0.9500],
            [1.0000, 1.0000]])
    """
    penalty = settings.penalty * alpha.sign()
    if settings.normalise == "task_and_penalty":
        gradient, penalty = gradient + penalty, torch.zeros_like(penalty)
    if settings.normalise != "none":
        gradient = gradient / (gradient.abs().mean(dim=1, keepdim=True) + 1e-8)
    return (alpha - settings.alpha_learning_rate * (gradient + penalty)).clamp(0, 1)


def choose_columns(importance: Tensor, rows: Sequence[int], num_bytes: int) -> list[list[int]]:
    """The columns that each block stores, ascending: the most important fours of any block, as far as the bytes go.

    A block's columns are taken in order of importance, four at a time (the last ones may be fewer). The next four are
    as important as their root mean square; what is worth nothing is not stored. A column costs 4 bytes a row, and 8
    for its index.

    Shape: importance (L, D), `rows` of each of the L blocks.

    >>> importance = torch.tensor([[9.0, 1, 9, 1, 9, 1, 9, 1], [2.0, 2, 2, 2, 2, 2, 2, 2]])
    >>> choose_columns(importance, rows=[10, 100], num_bytes=1900)
    [[0, 2, 4, 6], [0, 1, 2, 3]]
    """
    groups = [
        (row[columns].square().mean().sqrt().item(), block, columns.tolist())
        for block, row in enumerate(importance)
        for columns in row.argsort(descending=True, stable=True).split(4)
    ]
    chosen: list[list[int]] = [[] for _ in rows]
    full = {block for block, count in enumerate(rows) if not count}
    for worth, block, columns in sorted(groups, key=lambda group: -group[0]):
        cost = len(columns) * (4 * rows[block] + 8)
        if worth == 0 or cost > num_bytes:
            full.add(block)  # what is worth less does not go before it, even if it takes less
        elif block not in full:
            chosen[block] += columns
            num_bytes -= cost
    return [sorted(columns) for columns in chosen]


def search(
    model: Model,
    train: Loader,
    valid: Loader,
    *,
    settings: DNIS | None = None,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """The dimensions that each block of values keeps, with the weights of the search, alpha in them, to fine-tune from.

    The fine-tuning is needed: the network has not seen the tables that the search leaves.

    Args:
        model: any tower, on a `TableEmbedding` with plain tables; it is not changed.
        train: moves the weights.
        valid: chooses the epoch of the warm start, and moves alpha.
        settings: the method's.
        seed: of dropout in the warm start.
        out: folder where the search is kept after every epoch; started again there, it goes on.
        console: gets a line an epoch.

    Raises:
        NotImplementedError: there are several processes.
        NonFiniteLossError: a loss, or the gradient of alpha, is NaN or infinite.
        ValueError: the model has no such tables, the budget is below what takes bytes whatever is dropped, or `out`
            holds another search.
        SchemaError: ids are not in order of frequency, since the data was prepared like other data.
    """
    refuse_several_processes()
    settings, console = settings or DNIS(), console or Console(stderr=True)
    identity = identity_of(model, train, settings, seed)
    searched, lookup, counts = soft_model(model, train, settings)
    num_bytes = _bytes_for_columns(model, lookup, settings)
    torch.manual_seed(seed)
    if settings.warm_epochs:
        train.set_epoch(0)
        fit(
            ExactEngine(searched, learning_rate=settings.learning_rate, embedding_l2=settings.embedding_l2),
            train,
            valid,
            max_epochs=settings.warm_epochs,
            patience=1,
            checkpoints=None if out is None else Checkpoints(Path(out) / "warm", log=console.print),
            identity=identity,
            console=console,
        )
    engine = BilevelEngine(searched, lookup, valid, settings)

    def after(epoch: int) -> bool:
        means = " ".join(f"{alpha:.2f}" for alpha in lookup.alpha.mean(dim=1).tolist())
        console.print(f"  mean alpha of each block: {means}", highlight=False)
        return False

    search_epochs(
        engine,
        train,
        settings.epochs,
        after=after,
        out=None if out is None else Path(out) / "search",
        identity=identity,
        console=console,
    )
    return plan_of(searched, lookup, counts, num_bytes, frequency_power=settings.frequency_power)


def soft_model(model: Model, train: Loader, settings: DNIS) -> tuple[Model, SoftBlocks, dict[str, Tensor]]:
    """A copy of the model that looks up through `SoftBlocks`, these, and how often train has each id: table -> (rows,).

    Raises:
        ValueError: the embedding has no plain tables of one width.
        SchemaError: ids are not in order of frequency, since the data was prepared like other data.
    """
    check_order(train.folder, train.schema, "DNIS")
    searched, tables = with_plain_tables(model, "DNIS searches")
    vocabulary = {feature.name: vocabulary_of(feature) for feature in train.schema.sparse}
    train.set_epoch(0)
    found = count_reads(train.schema, train)
    configs = tables.embedding_bag_configs()
    counts = {config.name: found[vocabulary[config.feature_names[0]]] for config in configs}
    lookup = SoftBlocks(tables, frequency_blocks(counts, settings.shares))
    put(searched, PATH, lookup)
    return searched, lookup, counts


class BilevelEngine(ExactEngine):
    """Every step on train is followed by one of alpha on validation, at the weights as they now are.

    That step takes the gradient with respect to alpha alone, and so trains no table on validation. Tower, head and
    encoders are frozen, and stay in evaluation mode: their running statistics do not move either.
    """

    def __init__(self, model: Model, lookup: SoftBlocks, valid: Loader, settings: DNIS) -> None:
        self._frozen = model.network()
        for part in self._frozen:
            part.requires_grad_(False)
        super().__init__(
            model, learning_rate=settings.learning_rate, embedding_l2=settings.embedding_l2, max_grad_norm=None
        )
        self._lookup, self._settings = lookup, settings
        self._held_out = functools.partial(without_end, valid)

    def train(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Two steps for every batch of train."""
        for part in self._frozen:
            part.eval()
        held_out = self._held_out()
        for batch, loss in super().train(batches):
            if torch.isfinite(loss):
                self._step_alpha(next(held_out))
            yield batch, loss

    def gradient(self, batch: Batch) -> Tensor:
        """d loss / d alpha, (L, D)."""
        alpha = self._lookup.alpha.requires_grad_()
        try:
            loss = self.loss(self.model(batch), batch.labels, batch.weights)
            (gradient,) = torch.autograd.grad(loss, alpha)
        finally:
            alpha.requires_grad_(False)
        return gradient

    def _step_alpha(self, batch: Batch) -> None:
        gradient = self.gradient(batch)
        if not torch.isfinite(gradient).all():
            raise NonFiniteLossError(
                "the gradient of alpha on a batch of validation is NaN or infinite: check validation's numbers, or "
                "lower the learning rate"
            )
        self._lookup.alpha.copy_(alpha_step(self._lookup.alpha, gradient, self._settings))


def _bytes_for_columns(model: Model, lookup: SoftBlocks, settings: DNIS) -> int:
    """What the budget leaves for columns: without all that takes bytes whatever is dropped."""
    before = bytes_of(model)
    num_bytes = int(before.embedding / settings.ratio) if settings.num_bytes is None else settings.num_bytes
    tables: int = sum(bag.weight.numel() * 4 for bag in lookup.tables.embedding_bags.values())
    fixed = before.embedding - tables + 8 * 2 * len(lookup.blocks) * len(lookup.alpha)
    rows = min(count for count in _rows(lookup) if count)
    least = fixed + min(4, lookup.alpha.shape[1]) * (4 * rows + 8)
    if num_bytes < least:
        raise ArgumentError(
            f"DNIS: {num_bytes:,} bytes do not hold four columns of the smallest block: first-order weights, vectors "
            f"of numbers and the ends of blocks take {fixed:,} in any case, so ask for {least:,} or more"
        )
    return num_bytes - fixed


def _rows(lookup: SoftBlocks) -> list[int]:
    """Of each block."""
    blocks = torch.cat(list(lookup.blocks.values()))
    return torch.bincount(blocks, minlength=len(lookup.alpha)).tolist()


def importance(lookup: SoftBlocks, counts: Mapping[str, Tensor], power: float) -> Tensor:
    """|alpha| times the root mean square of the column over the block's rows, weighted by counts^power: (L, D).

    Shape: counts (rows,) for each table.
    """
    squares = torch.zeros_like(lookup.alpha)
    for name, bag in lookup.tables.embedding_bags.items():
        weighted = bag.weight.detach().square() * counts[name].unsqueeze(1).float() ** power
        squares.index_add_(0, lookup.blocks[name], weighted)
    rows = torch.tensor(_rows(lookup)).clamp(min=1)
    return lookup.alpha.abs() * (squares / rows.unsqueeze(1)).sqrt()


@torch.no_grad()
def plan_of(
    searched: Model, lookup: SoftBlocks, counts: dict[str, Tensor], num_bytes: int, *, frequency_power: float = 0.0
) -> Plan:
    """The most important columns in so many bytes, and the weights that go with them, as a plan."""
    rows = _rows(lookup)
    columns = choose_columns(importance(lookup, counts, frequency_power), rows, num_bytes)
    configs = lookup.tables.embedding_bag_configs()
    vocabularies = [
        BlockedVocabulary(
            config.name,
            tuple(config.feature_names),
            ends=tuple(torch.bincount(lookup.blocks[config.name], minlength=len(rows)).cumsum(0).tolist()),
            pooling="mean" if config.pooling == PoolingType.MEAN else "sum",
        )
        for config in configs
    ]
    names = [name for config in configs for name in config.feature_names]
    smaller = BlockTables(vocabularies, columns=columns, embedding_dim=lookup.alpha.shape[1], names=names)
    for name, table in lookup.rows().items():
        smaller.fill(name, table)
    weights = {
        name: tensor.clone() for name, tensor in searched.state_dict().items() if not name.startswith(f"{PATH}.")
    }
    weights |= {f"{PATH}.{name}": tensor for name, tensor in smaller.state_dict().items()}
    return Plan(
        "dnis",
        {PATH: {"kind": "blocks", **smaller.describe()}},
        weights,
        _summary(smaller, counts, lookup.alpha),
    )


def _summary(smaller: BlockTables, counts: dict[str, Tensor], alpha: Tensor) -> dict[str, Any]:
    """What is to be said and drawn."""
    widths = [len(columns) for columns in smaller.columns]
    dims, kept = {}, {}
    totals = [0] * len(widths)
    reads = [0] * len(widths)
    for name, vocabulary in smaller.vocabularies.items():
        sizes = vocabulary.sizes
        sizes[0] -= NUM_RESERVED_IDS
        num_values = max(sum(sizes), 1)
        for block, (start, end) in enumerate(itertools.pairwise((0, *vocabulary.ends))):
            totals[block] += sizes[block]
            reads[block] += int(counts[name][start:end].sum())
        for feature in vocabulary.feature_names:
            dims[feature] = round(sum(size * width for size, width in zip(sizes, widths)) / num_values, 3)
            kept[feature] = [sum(size for size, width in zip(sizes, widths) if width), sum(sizes)]
    words = [
        f"Block {block + 1}: {total:,} values, {100 * read / max(sum(reads), 1):.1f} % of all reads, keep {width} of "
        f"{smaller.embedding_dim} dimensions."
        for block, (total, read, width) in enumerate(zip(totals, reads, widths))
    ]
    return {"words": words, "dims": dims, "kept": kept, "alpha": [[round(a, 4) for a in row] for row in alpha.tolist()]}
