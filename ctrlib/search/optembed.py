"""OptEmbed: which rows of the tables, and how wide. F. Lyu et al., "OptEmbed: Learning Optimal Embedding Table for
Click-through Rate Prediction", CIKM 2022, https://arxiv.org/abs/2208.04482.

A supernet is trained in which a value counts only while the L1 norm of its row is above the threshold of its table,
m_v = 1[||E_v||_1 > t_f], and in which each field of each sample shows its first k columns only, k drawn anew. Its
thresholds are pushed up by alpha sum_f exp(-t_f), and rows down by L2. Then an evolutionary search looks for the widths
that validation likes best, with the supernet's weights, and the small model is trained again.

What prunes is mostly the decay of rows that the data do not need, not the thresholds, which with the published settings
move by 1e-4 in an epoch. The exact engine's L2 is dense, so that rows decay in every step, whether they are read or
not: with an optimiser that leaves untouched rows alone, and without L2, nothing would be pruned.

Where this differs from the paper and its code:

* The evolution keeps its best, and what it reports is what it scored (`ctrlib.search.evolution`). Its fitness charges
  for bytes (`price`) and may be held to a budget: by validation AUC alone, noise decides the width of a field that
  matters little.
* A pruned value is gone from all tables; the first-order weights take part in the decision. Fields that share a table
  have one width and one threshold.
* The ids of padding, missing and unseen values always keep their rows, which all pruned values read as zero.
* The retraining starts from the weights that the model had before the search, a fresh start if it was fresh, or goes
  on from the supernet's (`inherit`). The supernet's rows start as the paper's do (`start_rows`).
* L2 is on tables, not on the network; Adam moves all but the thresholds, which plain SGD does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.data.loader import Loader
from ctrlib.errors import ArgumentError
from ctrlib.losses import add_auxiliary
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS, PADDING_ID, Schema
from ctrlib.search.bytes import bytes_of
from ctrlib.search.evolution import Evolution, Found, Genes, evolve
from ctrlib.search.gates import (
    GatedTables,
    kept_ids,
    prune,
    put_gates,
    start_rows,
    with_other_weights,
    with_own_tables,
    without_gates,
)
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.stages import identity_of, search_epochs
from ctrlib.structure import put
from ctrlib.training.evaluate import evaluate
from ctrlib.training.exact import ExactEngine


@dataclass(frozen=True)
class OptEmbed:
    """How to search; the paper's values in brackets.

    Raises:
        ValueError: a value is out of its range.
    """

    alpha: float = 1e-5
    """Of the push on the thresholds [1e-6 to 1e-4]."""
    threshold_learning_rate: float = 1e-4
    """SGD's step for the thresholds [1e-4, 3e-5]. They rise by this times alpha in a step: for pruning by thresholds,
    and not by decay alone, far more is needed."""
    learning_rate: float = 1e-3
    """Adam's, for all else [1e-5 to 3e-4]."""
    embedding_l2: float = 1e-5
    """L2 on whole tables [1e-6 to 1e-3]."""
    epochs: int = 30
    """Of the supernet at most; the best by validation AUC is kept."""
    whole: float = 0.0
    """Share of the samples that show all columns of all fields [0]: last columns, which 1 sample in D shows otherwise,
    learn what they are worth if there are samples enough for the first ones, too."""
    patience: int = 1
    """After as many epochs without a better AUC it stops [1]; before that, each divides the learning rate by ten."""
    generations: int = 30
    """Of the evolution; none for a random search."""
    parents: int = 15
    """That breed, and random candidates at first."""
    mutations: int = 10
    """New ones of each generation."""
    crossovers: int = 10
    """And of these."""
    mutation_rate: float = 0.1
    """Of each field's width."""
    prune_rows: bool = True
    """False: every row stays, and only widths are searched (OptEmbed-D)."""
    rows: int = 100_000
    """Of validation, from its start, on which a candidate is scored."""
    inherit: bool = False
    """Retrain from the supernet's weights, all of them, and not from those before the search."""
    multiple_of: int = 1
    """Widths are multiples of this; the fused engine wants 4."""
    num_bytes: int | None = None
    """Budget for all embeddings of the small model, first-order weights and maps of ids included."""
    price: float = 5e-4
    """Validation AUC that the tables' bytes, with all kept rows in full width, are worth."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("alpha", self.alpha, 0),
            ("threshold_learning_rate", self.threshold_learning_rate, 0),
            ("learning_rate", self.learning_rate, 0),
            ("embedding_l2", self.embedding_l2, 0),
            ("epochs", self.epochs, 1),
            ("patience", self.patience, 1),
            ("whole", self.whole, 0),
            ("rows", self.rows, 1),
            ("multiple_of", self.multiple_of, 1),
            ("price", self.price, 0),
        ):
            if not value >= least:
                raise ArgumentError(f"OptEmbed: {name} must be {least} or more, got {value}")
        if self.whole > 1:
            raise ArgumentError(f"OptEmbed: whole must be 1 or less, got {self.whole}")
        _ = self.evolution

    @property
    def evolution(self) -> Evolution:
        """The part of them that is for `evolve`."""
        return Evolution(self.generations, self.parents, self.mutations, self.crossovers, self.mutation_rate)


# Settings that the supernet does not depend on.
EVOLUTION = ("inherit", "rows", "num_bytes", "price", *(field.name for field in fields(Evolution)))


class UnitStep(torch.autograd.Function):
    """1[x > 0], with the "long-tail" derivative 2 - 4 |x| up to |x| = 0.4, 0.4 up to 1, and 0 beyond.

    >>> x = torch.tensor([-2.0, -0.5, 0.0, 0.2], requires_grad=True)
    >>> step = UnitStep.apply(x)
    >>> step.sum().backward()
    >>> step.tolist(), [round(g, 4) for g in x.grad.tolist()]
    ([0.0, 0.0, 0.0, 1.0], [0.0, 0.4, 2.0, 1.2])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: D102
        (x,) = ctx.saved_tensors
        size = x.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return gradients[0] * slope


class RowGates(nn.Module):
    """m_v = 1[||E_v||_1 > t_f], with the derivative of `UnitStep` for rows and thresholds; 1 for the reserved ids, and
    for all without `prune`.

    `weights`: the rows of each vocabulary, which belong to another module. `thresholds` (V,) start at 0, and take a
    step of SGD as soon as they have a gradient.

    Shape: name of a vocabulary -> (rows,).
    """

    thresholds: Tensor

    def __init__(self, weights: Mapping[str, nn.Parameter], *, learning_rate: float, prune: bool = True) -> None:
        super().__init__()
        self.prune = prune
        self.weights = dict(weights)  # not registered here: they belong to the tables
        self.vocabularies = list(weights)
        # Not a parameter: Adam and L2 have no business here.
        self.register_buffer("thresholds", torch.zeros(len(weights)).requires_grad_())

        def take_step(thresholds: Tensor) -> None:
            with torch.no_grad():
                thresholds -= learning_rate * cast(Tensor, thresholds.grad)
            thresholds.grad = None

        self.thresholds.register_post_accumulate_grad_hook(take_step)  # type: ignore[no-untyped-call]

    def forward(self, vocabulary: str) -> Tensor:
        """The gates of a vocabulary."""
        if not self.prune:
            return self.weights[vocabulary].new_ones(len(self.weights[vocabulary]))
        norms = self.weights[vocabulary].abs().sum(1)
        threshold = self.thresholds[self.vocabularies.index(vocabulary)]
        gates: Tensor = UnitStep.apply(norms - threshold)  # type: ignore[no-untyped-call]
        return torch.cat([gates.new_ones(NUM_RESERVED_IDS), gates[NUM_RESERVED_IDS:]])

    def kept(self) -> dict[str, Tensor]:
        """Vocabulary -> which of its rows stay, (rows,) of bool."""
        return {name: self(name).detach() > 0 for name in self.vocabularies}

    def push(self) -> Tensor:
        """sum_f exp(-t_f)."""
        return torch.exp(-self.thresholds).sum()


class PrefixMasked(nn.Module):
    """Shows the first columns of each field: in training of each sample a number drawn from all, else `widths`.

    Widths are `multiple_of` times 1 to `levels`, and those of fields that share a table are drawn together. A share
    `whole` of the samples shows all columns.

    Shape: KeyedJaggedTensor -> KeyedTensor, the keys and widths of `lookup`.
    """

    def __init__(self, lookup: GatedTables, *, multiple_of: int = 1, whole: float = 0.0) -> None:
        super().__init__()
        self.lookup = lookup
        self.whole = whole
        configs = lookup.tables.embedding_bag_configs()
        self.embedding_dim = configs[0].embedding_dim
        if self.embedding_dim % multiple_of:
            raise ArgumentError(f"embedding_dim={self.embedding_dim} is no multiple of multiple_of={multiple_of}")
        self.multiple_of, self.levels = multiple_of, self.embedding_dim // multiple_of
        self.owner = {name: place for place, config in enumerate(configs) for name in config.feature_names}
        self.vocabularies = [lookup.vocabularies[config.name] for config in configs]
        self.genes: Genes = (self.levels,) * len(configs)

    @property
    def widths(self) -> dict[str, int]:
        """Vocabulary -> width."""
        return {name: gene * self.multiple_of for name, gene in zip(self.vocabularies, self.genes)}

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        pooled = self.lookup(kjt)
        values: Tensor = pooled.values()
        if self.training:
            genes = torch.randint(1, self.levels + 1, (values.shape[0], len(self.genes)), device=values.device)
            if self.whole:
                genes[torch.rand(len(genes), device=values.device) < self.whole] = self.levels
        else:
            genes = torch.tensor([self.genes], device=values.device)
        columns = torch.arange(self.embedding_dim, device=values.device)
        mask = columns < self.multiple_of * genes[:, [self.owner[key] for key in pooled.keys()]].unsqueeze(2)  # noqa: SIM118
        return KeyedTensor(pooled.keys(), pooled.length_per_key(), values * mask.flatten(1))


def search(
    model: Model,
    train: Loader,
    valid: Loader,
    *,
    settings: OptEmbed | None = None,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """The rows to keep and the width of each table; what is pruned, row or column, reads as zero.

    Args:
        model: freshly built, any tower; it is not changed. Its weights are those that the retraining starts from.
        train: data of the supernet.
        valid: decides when the supernet is done, and scores the candidates: use test for neither.
        settings: the method's.
        seed: of dropout, the samples' widths, and the evolution.
        out: folder where the supernet is kept after every epoch; started again there, the search goes on. So does one
            with another budget or another evolution: the supernet is the same.
        console: gets a line an epoch.

    Raises:
        NotImplementedError: there are several processes.
        ValueError: the model has no tables, the budget is too small, or `out` holds another search.
    """
    settings, console = settings or OptEmbed(), console or Console(stderr=True)
    # Of the supernet: what has to do with the evolution only may change.
    evolution = {name: getattr(OptEmbed(), name) for name in EVOLUTION}
    identity = identity_of(model, train, replace(settings, **evolution), seed)
    torch.manual_seed(seed)
    supernet, masked, gates = make_supernet(model, train.schema, settings)
    start_rows(gates.weights.values())
    engine = ExactEngine(
        supernet, learning_rate=settings.learning_rate, embedding_l2=settings.embedding_l2, max_grad_norm=None
    )
    best = {name: tensor.detach().clone() for name, tensor in supernet.state_dict().items()}
    memory = {"auc": float("-inf"), "worse": 0}

    def after(epoch: int) -> bool:
        auc = evaluate(supernet, valid, quick=True)["auc"]
        if math.isnan(auc):
            raise ArgumentError(
                "validation holds one class only (or no known label), so AUC is undefined: use more rows"
            )
        num_kept = sum(int(gates(name).sum()) - NUM_RESERVED_IDS for name in gates.vocabularies)
        console.print(f"  valid AUC {auc:.6f} in full width, {num_kept:,} rows above their thresholds", highlight=False)
        if not auc > memory["auc"]:
            memory["worse"] += 1
            engine.learning_rates = [rate / 10 for rate in engine.learning_rates]
            return memory["worse"] >= settings.patience
        memory["auc"], memory["worse"] = auc, 0
        for name, tensor in supernet.state_dict().items():
            best[name].copy_(tensor)
        return False

    search_epochs(
        engine,
        train,
        settings.epochs,
        after=after,
        tensors=best,
        memory=memory,
        out=out,
        identity=identity,
        console=console,
    )
    supernet.load_state_dict(best)
    kept = gates.kept()
    found, column = best_widths(model, supernet, masked, kept, valid, settings=settings, seed=seed, console=console)
    if not settings.inherit:
        return _plan(model, train.schema, masked, kept, found, column, settings)
    put(supernet, next(path for path, part in supernet.named_modules() if part is masked), masked.lookup)
    trained = without_gates(supernet)
    return with_other_weights(_plan(trained, train.schema, masked, kept, found, column, settings), trained)


def make_supernet(model: Model, schema: Schema, settings: OptEmbed) -> tuple[Model, PrefixMasked, RowGates]:
    """A copy of the model whose rows and columns are masked, and that adds alpha sum_f exp(-t_f) to the loss."""
    supernet, collections, vocabularies = with_own_tables(model, schema)
    weights: dict[str, nn.Parameter] = {}
    for tables in collections.values():
        for config in tables.embedding_bag_configs():
            weight = cast(nn.Parameter, tables.embedding_bags[config.name].weight)
            weights.setdefault(vocabularies[config.feature_names[0]], weight)
    gates = RowGates(weights, learning_rate=settings.threshold_learning_rate, prune=settings.prune_rows)
    put_gates(supernet, collections, gates, vocabularies)
    path = next(iter(collections))
    masked = PrefixMasked(
        cast(GatedTables, supernet.get_submodule(path)), multiple_of=settings.multiple_of, whole=settings.whole
    )
    put(supernet, path, masked)

    def push(module: nn.Module, *_: Any) -> None:
        if module.training:
            add_auxiliary(settings.alpha * gates.push())

    supernet.register_forward_hook(push)
    return supernet, masked, gates


def best_widths(
    model: Model,
    supernet: Model,
    masked: PrefixMasked,
    kept: Mapping[str, Tensor],
    valid: Loader,
    *,
    settings: OptEmbed,
    seed: int,
    console: Console,
) -> tuple[Found, dict[str, int]]:
    """The evolution, which leaves its widths in `masked`, and for each vocabulary the bytes of one column."""
    column = {name: 4 * len(kept_ids(kept[name])) for name in masked.vocabularies}
    narrowest = prune(
        model,
        valid.schema,
        kept,
        method="optembed",
        dropped_to=PADDING_ID,
        dims=dict.fromkeys(masked.vocabularies, 1),
    )
    rest = bytes_of(materialise(model, narrowest)).embedding - sum(column.values())

    # A field that keeps no value is as wide as its reserved rows need.
    living = [place for place, name in enumerate(masked.vocabularies) if kept[name][NUM_RESERVED_IDS:].any()]

    def whole(genes: Genes) -> Genes:
        drawn = dict(zip(living, genes))
        return tuple(drawn.get(place, 1) for place in range(len(masked.vocabularies)))

    def size(genes: Genes) -> int:
        widths = (settings.multiple_of * gene for gene in whole(genes))
        return rest + sum(width * column[name] for width, name in zip(widths, masked.vocabularies))

    full = masked.embedding_dim * sum(column.values())
    sample = list(itertools.islice(valid, -(-settings.rows // valid.batch_size)))

    def fitness(genes: Genes) -> float:
        masked.genes = whole(genes)
        price: float = settings.price * (size(genes) - rest) / full
        return float(evaluate(supernet, sample, quick=True)["auc"]) - price

    if not living:
        raise ArgumentError(
            "no value of any field is above its threshold: lower alpha, threshold_learning_rate or embedding_l2"
        )
    found = evolve(
        fitness,
        length=len(living),
        largest=masked.levels,
        size=size,
        budget=float("inf") if settings.num_bytes is None else settings.num_bytes,
        first=[(masked.levels,) * len(living)],
        settings=settings.evolution,
        seed=seed,
    )
    masked.genes = whole(found.best)
    console.print(
        f"evolution: {len(found.scored)} candidates, fitness {found.curve[0]:.6f} of the first {settings.parents}, "
        f"{found.fitness:.6f} at last",
        highlight=False,
    )
    return found, column


def _plan(
    model: Model,
    schema: Schema,
    masked: PrefixMasked,
    kept: Mapping[str, Tensor],
    found: Found,
    column: Mapping[str, int],
    settings: OptEmbed,
) -> Plan:
    """Rows and columns as decided, from the model's own weights, with the words to explain it."""
    plan = prune(model, schema, kept, method="optembed", dropped_to=PADDING_ID, dims=masked.widths)
    dims = {name: masked.widths[masked.vocabularies[place]] for name, place in masked.owner.items()}
    by_width: dict[int, list[str]] = {}
    for name, width in sorted(dims.items(), key=lambda item: -item[1]):
        if plan.summary["kept"][name][0]:
            by_width.setdefault(width, []).append(name)
    stored = sum(masked.widths[name] * column[name] for name in masked.vocabularies)
    full = masked.embedding_dim * sum(4 * len(kept[name]) for name in masked.vocabularies)
    words = [
        *plan.summary["words"],
        *(f"{width} of {masked.embedding_dim} columns: {', '.join(names)}." for width, names in by_width.items()),
        f"Rows and columns together leave {stored / full:.0%} of the tables' numbers.",
    ]
    if not settings.price and settings.num_bytes is None:
        words.append("No price and no budget was set: the widths of fields that matter little are chance.")
    plan.summary.update(words=words, dims=dims, fitness=found.fitness, curve=found.curve, candidates=len(found.scored))
    return plan
