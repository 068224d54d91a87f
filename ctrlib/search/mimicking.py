"""Low-rank compression of a trained model by Atomic Feature Mimicking: H. Yu et al., "Unified Low-rank Compression
Framework for Click-through Rate Prediction", KDD 2024, https://arxiv.org/abs/2405.18146, after H. Yu and J. Wu,
"Compressing Transformers: Features Are Low-Rank, but Weights Are Not!", AAAI 2023.

Not the weights are approximated but what they produce on the training data, in closed form and without labels: outputs
y of mean mu and covariance U Lambda U^T become U_r U_r^T (y - mu) + mu, with r of the eigenvectors, and the mean
squared error is the sum of the other eigenvalues. What a table produces is its rows, as often as they are looked up, so
that a histogram of the ids is all that is needed of the data.

    plan = low_rank(model, schema, train, tables=Goal(ratio=8), layers=Goal(energy=0.99))
    smaller = apply_low_rank(model, plan)
    fit(ExactEngine(smaller), train, valid)  # an ordinary model: fine-tuned, sharded and served as any

The paper sets ranks by hand, one for all tables; here they can also go where a byte keeps the most energy. Its code, as
published, does not run, and is not followed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ctrlib.batch import Batch
from ctrlib.distributed import gather
from ctrlib.embeddings.narrow import NarrowTable, NarrowTables
from ctrlib.embeddings.small_events import NarrowEvents
from ctrlib.embeddings.table import TableEmbedding, by_vocabulary, num_rows, pooling_of
from ctrlib.errors import ArgumentError
from ctrlib.layers import LowRankLinear
from ctrlib.model import Model
from ctrlib.schema import Pooling, Schema, SparseFeature, vocabulary_of
from ctrlib.search.counting import count_reads
from ctrlib.search.ranks import Goal, Level, choose_ranks, smaller_levels, table_levels


@dataclass(frozen=True)
class LowRankTable:
    """What becomes of one vocabulary's table: mean (D,) and basis (R, D), or None where there is none."""

    stored: NarrowTable
    mean: Tensor | None = None
    basis: Tensor | None = None


@dataclass(frozen=True)
class LowRankLayer:
    """The subspace in which a linear layer's outputs stay: mean (out,) and basis (R, out)."""

    mean: Tensor
    basis: Tensor


@dataclass(frozen=True)
class LowRankPlan:
    """What `low_rank` finds and `apply_low_rank` does: plain data.

    `tables`: path in the model of tables -> what becomes of each. `layers`: path of a linear layer -> the same; those
    that stay as they are, are not in it.
    """

    tables: dict[str, list[LowRankTable]]
    layers: dict[str, LowRankLayer]


def low_rank(
    model: Model,
    schema: Schema,
    batches: Iterable[Batch],
    *,
    tables: Goal | None = None,
    layers: Goal | None = None,
    multiple_of: int = 4,
    smooth: float = 1.0,
    centred: bool = True,
) -> LowRankPlan:
    """Find the low-rank form of a trained model, which is left as it is.

    `tables` and `layers` as in `low_rank_tables` and `low_rank_layers`; None leaves them alone. `batches` of training
    data are iterated once for the tables and once for the layers.

    Raises:
        ValueError: there is no goal, or as those functions do.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_batch, example_schema
    >>> schema = example_schema()
    >>> model = models.mlp(Inputs(schema, embedding_dim=8), hidden=(32, 32))
    >>> plan = low_rank(model, schema, [example_batch(schema, 64)], tables=Goal(rank=4), layers=Goal(rank=8))
    >>> {path: len(layer.basis) for path, layer in plan.layers.items()}
    {'tower.layers.0': 8, 'tower.layers.2': 8}
    >>> small = apply_low_rank(model, plan)
    >>> model.embedding_bytes(), small.embedding_bytes()  # 60 rows; 3 decoders with means and 2 numbers' vectors
    (1984, 1504)
    """
    if tables is None and layers is None:
        raise ArgumentError("low_rank has nothing to do: give tables=Goal(...), layers=Goal(...) or both")
    found_tables: dict[str, list[LowRankTable]] = {}
    found_layers: dict[str, LowRankLayer] = {}
    if tables is not None:
        table_embeddings(model)  # what cannot be done is said before the data are read
        counts = count_reads(schema, batches)
        found_tables = low_rank_tables(
            model, schema, counts, goal=tables, multiple_of=multiple_of, smooth=smooth, centred=centred
        )
    if layers is not None:
        statistics = output_statistics(model, list(linear_layers(model)), batches)
        found_layers = low_rank_layers(model, statistics, goal=layers, multiple_of=multiple_of)
    return LowRankPlan(found_tables, found_layers)


# Tables.


def low_rank_tables(
    model: nn.Module,
    schema: Schema,
    counts: Mapping[str, Tensor],
    *,
    goal: Goal,
    multiple_of: int = 4,
    smooth: float = 1.0,
    centred: bool = True,
) -> dict[str, list[LowRankTable]]:
    """Path of each collection of tables -> a low-rank table for each vocabulary, by what `count_reads` found.

    Every feature counts the same, so a vocabulary's energy is that of a look-up times its number of features. Ranks are
    multiples of `multiple_of`, 4 being what the fused engine wants, or the whole width: that of tables which a decoder
    would make larger, unless the goal is one rank for all. `smooth` is as in `weighted_pca`. `centred=False` leaves out
    the means, which costs up to one rank; `fold_decoders` then takes bags and histories too.

    First-order weights (`Wide`) are as narrow as can be, so they are left alone, and not counted.

    Raises:
        ValueError: the goal cannot be met (the message says what can), `counts` lack a vocabulary, or there is no
            table.
    """
    embeddings = table_embeddings(model)
    vocabularies = {
        (path, vocabulary_of(members[0])): members
        for path, embedding in embeddings.items()
        for members in by_vocabulary([feature for feature in schema.sparse if feature.name in _names(embedding)])
    }
    found: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
    sizes: dict[tuple[str, str], tuple[int, Tensor]] = {}
    for (path, vocabulary), members in vocabularies.items():
        rows, seen = num_rows(members), counts.get(vocabulary, torch.empty(0))
        if len(seen) != rows:
            raise ArgumentError(
                f"vocabulary {vocabulary!r} has {rows} ids, but {len(seen)} counts: take `count_reads` of the schema "
                "that the model was trained with"
            )
        full = full_table(embeddings[path], members[0].name, rows)
        # Nothing reads the first row, that of padding.
        mean, basis, energies = weighted_pca(full[1:], seen[1:], smooth=smooth, centred=centred)
        found[path, vocabulary], sizes[path, vocabulary] = (mean, basis, energies), (rows, len(members) * energies)
    if goal.rank is not None:
        ranks = {key: min(goal.rank, len(energies)) for key, (_, energies) in sizes.items()}
    else:
        ranks = choose_ranks(*table_levels(sizes, multiple_of, centred), goal)
    tables: dict[str, list[LowRankTable]] = {}
    for (path, vocabulary), (mean, basis, energies) in found.items():
        members, rank = vocabularies[path, vocabulary], ranks[path, vocabulary]
        number, is_narrow = list(embeddings).index(path), rank < len(energies)
        stored = NarrowTable(
            f"{vocabulary}_{number}" if number else vocabulary,  # names of tables differ in a model
            tuple(member.name for member in members),
            rows=num_rows(members),
            rank=rank,
            pooling=_pooling(embeddings[path], members),
            centred=centred,
        )
        mean_of = mean.float() if is_narrow and centred else None
        tables.setdefault(path, []).append(LowRankTable(stored, mean_of, basis[:rank].float() if is_narrow else None))
    return tables


def weighted_pca(
    table: Tensor, counts: Tensor, *, smooth: float = 1.0, centred: bool = True, is_shard: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """mu = sum_v p_v E_v and the eigenvectors and eigenvalues of sum_v p_v (E_v - mu) (E_v - mu)^T, largest first.

    p_v is proportional to counts_v + smooth: rows that training never looked up, which 0 would approximate without any
    regard, count as seen `smooth` times. Of all affine maps of rank r, decoding (E_v - mu) basis_r^T by basis_r has the
    smallest expected squared error over look-ups, the sum of the energies after the first r. `centred=False`: mu = 0.
    `is_shard`: rows and counts are this process's part of them, and all processes call.

    Shape: (rows, D), (rows,) -> mean (D,), basis (D, D), energies (D,), in float64.

    Raises:
        ValueError: nothing has a weight, since all counts and `smooth` are 0.

    >>> table = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    >>> mean, basis, energies = weighted_pca(table, torch.tensor([5, 5, 0]), smooth=0.0)
    >>> mean.tolist(), basis[0].abs().tolist(), energies.tolist()
    ([0.0, 0.0], [1.0, 0.0], [1.0, 0.0])
    """
    weights = counts.double() + smooth
    sums = torch.zeros(table.shape[1] + 1, dtype=torch.float64)
    for rows, some in _chunks(table, weights):
        sums += torch.cat([some @ rows, some.sum().unsqueeze(0)])
    if is_shard:
        dist.all_reduce(sums)
    if not sums[-1] > 0:
        raise ArgumentError(f"no row has a weight: all {len(counts)} counts and smooth={smooth} are 0")
    mean = sums[:-1] / sums[-1] if centred else torch.zeros_like(sums[:-1])
    scatter = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows, some in _chunks(table, weights):
        rows = rows - mean
        scatter += rows.T @ (rows * some.unsqueeze(1))
    if is_shard:
        dist.all_reduce(scatter)
    return mean, *spectrum(scatter / sums[-1])


def _chunks(table: Tensor, weights: Tensor, size: int = 1 << 16) -> Iterable[tuple[Tensor, Tensor]]:
    """Some rows at a time in float64, so that a large table is never copied as a whole."""
    for start in range(0, len(table), size):
        yield table[start : start + size].double(), weights[start : start + size]


def spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors, a row each, and eigenvalues, from the largest on: (D, D) -> (D, D), (D,).

    >>> spectrum(torch.diag(torch.tensor([1.0, 4.0])))[1].tolist()
    [4.0, 1.0]
    """
    energies, vectors = torch.linalg.eigh(covariance)
    return vectors.T.flip(0), energies.flip(0).clamp(min=0)


# Layers.


def low_rank_layers(
    model: nn.Module, statistics: Mapping[str, tuple[Tensor, Tensor]], *, goal: Goal, multiple_of: int = 4
) -> dict[str, LowRankLayer]:
    """Path of a linear layer -> its low-rank form, by the `output_statistics` of those that may have one.

    Only layers that become smaller by it, so of rank R < in * out / (in + out). Every layer's energy counts as 1.

    Raises:
        ValueError: the goal cannot be met; the message says what can.
    """
    spectra = {name: spectrum(covariance) for name, (_, covariance) in statistics.items()}
    levels = {}
    for name in spectra:
        linear: Any = model.get_submodule(name)
        widths, width = linear.in_features + linear.out_features, linear.out_features
        ranks = range(multiple_of, width, multiple_of) if goal.rank is None else [goal.rank]
        found = [Level(rank, 4 * (rank * widths + rank + width)) for rank in ranks]
        levels[name] = smaller_levels(found, Level(width, 4 * sum(weight.numel() for weight in linear.parameters())))
    if goal.rank is not None:
        chosen = {name: ranks_of[0].rank for name, ranks_of in levels.items()}
    else:
        shares = {name: energies / energies.sum().clamp(min=1e-300) for name, (_, energies) in spectra.items()}
        chosen = choose_ranks(levels, shares, goal)
    return {
        name: LowRankLayer(statistics[name][0].float(), spectra[name][0][:rank].float())
        for name, rank in chosen.items()
        if rank < levels[name][-1].rank
    }


def linear_layers(model: Model) -> dict[str, nn.Linear]:
    """Path -> each `nn.Linear` of tower, head and encoders, but for the thin ones inside a `LowRankLinear`.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> list(linear_layers(models.mlp(Inputs(example_schema()), hidden=(32,))))
    ['tower.layers.0', 'head.linear']
    """
    network = {id(module) for part in model.network() for module in part.modules()}
    thin = {id(part) for module in model.modules() if isinstance(module, LowRankLinear) for part in module}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) in network - thin
    }


def output_statistics(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Batch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (out,) and covariance (out, out) of each layer's outputs over `batches`, in evaluation mode, in float64.

    `layers` are paths in the model. Those that are not called as modules, so that they could not be replaced, are
    missing in what is returned. Rows of weight 0 do not count. The cost is a forward pass, and out^2 for every row: a
    hundred thousand rows are enough. Of several processes, each gives its own batches, and all get the whole.

    Raises:
        ValueError: there is no batch.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    moments = {name: Moments(linear.out_features) for name, linear in linears.items()}
    current: list[Batch] = []

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
            weights = current[-1].weights
            rows = output[weights > 0] if len(output) == len(weights) else output
            moments[name].add(rows.flatten(0, -2).cpu())

        return linears[name].register_forward_hook(add)

    hooks = [watch(name) for name in layers]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            for batch in batches:
                current[:] = [batch.to(device)]
                model(current[0])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not current:
        raise ArgumentError("there is nothing to take statistics of: `batches` gave no batch; pass a Loader or a list")
    own, *others = gather(moments)
    for name, part in ((name, part) for other in others for name, part in other.items()):
        own[name].merge(part)
    return {name: (found.mean, found.scatter / found.count) for name, found in own.items() if found.count}


class Moments:
    """Number, mean (C,) and scatter sum (x - mean) (x - mean)^T (C, C) of rows, in float64.

    Parts are put together by the update of Chan, Golub and LeVeque (1979): E[x x^T] - mean mean^T would lose the digits
    where the mean is large beside the spread.

    >>> moments = Moments(1)
    >>> for rows in ([[1.0], [2.0]], [[6.0]]):
    ...     moments.add(torch.tensor(rows).double() + 1e9)
    >>> moments.count, moments.mean.tolist(), moments.scatter.tolist()
    (3, [1000000003.0], [[14.0]])
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """(N, C); N may be 0."""
        if len(rows):
            part = Moments(rows.shape[1])
            part.count, part.mean = len(rows), rows.double().mean(0)
            centred = rows.double() - part.mean
            part.scatter = centred.T @ centred
            self.merge(part)

    def merge(self, other: Moments) -> None:
        """Take in what `other` has seen."""
        total = max(self.count + other.count, 1)
        step = other.mean - self.mean
        self.mean = self.mean + step * (other.count / total)
        self.scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / total)
        self.count += other.count


def factorise(linear: nn.Linear, mean: Tensor, basis: Tensor, *, activation: nn.Module | None = None) -> LowRankLinear:
    """y = W x + b as U_r (U_r^T W x + U_r^T b) + (I - U_r U_r^T) mean: the outputs' projection onto `basis`, r rows.

    With an `activation` in between this holds no longer, not even at full rank, and is only where fine-tuning starts.

    Shape: mean (out,), basis (r, out).

    >>> linear = nn.Linear(3, 2)
    >>> x = torch.randn(5, 3)
    >>> exact = factorise(linear, mean=torch.zeros(2), basis=torch.eye(2))
    >>> bool(torch.allclose(exact(x), linear(x), atol=1e-6))
    True
    """
    made = LowRankLinear(linear.in_features, linear.out_features, rank=len(basis), activation=activation)
    first: Any = made[0]
    last: Any = made[-1]
    with torch.no_grad():
        up, weight, mean = basis.double(), linear.weight.double().cpu(), mean.double()
        first.weight.copy_(up @ weight)
        first.bias.copy_(up @ linear.bias.double().cpu() if linear.bias is not None else torch.zeros(len(basis)))
        last.weight.copy_(up.T)
        last.bias.copy_(mean - up.T @ (up @ mean))
    return made


# Models.


def apply_low_rank(model: Model, plan: LowRankPlan) -> Model:
    """The smaller model that a plan of `low_rank` describes; `model` stays as it is, and nothing is shared."""
    paths = [*plan.tables, *plan.layers]
    # Copied is only what stays: a part that the memo holds is taken for its own copy.
    small = copy.deepcopy(model, {id(part): part for part in map(model.get_submodule, paths)})
    for path, tables in plan.tables.items():
        before: Any = model.get_submodule(path.rpartition(".")[0])
        after: Any = small.get_submodule(path.rpartition(".")[0])
        stored = [table.stored for table in tables]
        narrow: Any
        if isinstance(before, TableEmbedding):
            narrow = NarrowTables(stored, embedding_dim=before.out_shape[1], names=before.names)
            after.first_rows = None
        else:
            narrow = NarrowEvents(stored, embedding_dim=before.out_shape[-1])
        for table in tables:
            full = full_table(before, table.stored.feature_names[0], table.stored.rows)
            narrow.fill(table.stored.name, full, mean=table.mean, decoder=table.basis)
        after.tables = narrow
    for path, layer in plan.layers.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        small.set_submodule(path, factorise(linear, layer.mean, layer.basis))
    return small.to(next(model.parameters()).device).train(model.training)


def table_embeddings(model: nn.Module) -> dict[str, Any]:
    """Path of the tables -> each embedding that has TorchRec's, which can be made smaller.

    That is a `TableEmbedding`, or one whose events are looked up one by one, such as `SequenceEmbedding`.

    Raises:
        ValueError: there is none.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> list(table_embeddings(models.mlp(Inputs(example_schema()))))
    ['embedding.tables']
    """
    found = {}
    for path, module in model.named_modules():
        tables = getattr(module, "tables", None)
        of_bags = isinstance(module, TableEmbedding) and isinstance(tables, EmbeddingBagCollection)
        of_events = isinstance(tables, EmbeddingCollection) and hasattr(module, "out_shape")
        if of_bags or of_events:
            found[f"{path}.tables" if path else "tables"] = module
    if not found:
        raise ArgumentError(
            "the model has no embedding with tables of TorchRec: nothing to make smaller, or it was done already"
        )
    return found


def _names(embedding: Any) -> list[str]:
    """The features that an embedding's own tables look up."""
    return [name for config in _configs(embedding.tables) for name in config.feature_names]


def _pooling(embedding: Any, members: Sequence[SparseFeature]) -> Pooling:
    is_mean = isinstance(embedding, TableEmbedding) and pooling_of(members) == "mean"
    return "mean" if is_mean else "sum"


def _configs(tables: Any) -> list[Any]:
    of_bags = isinstance(tables, EmbeddingBagCollection)
    return list(tables.embedding_bag_configs() if of_bags else tables.embedding_configs())


def full_table(embedding: Any, feature: str, rows: int) -> Tensor:
    """The `rows` of the vocabulary that a feature looks up, cut out of a stack if need be; not a copy: (rows, D)."""
    tables = embedding.tables
    name = next(config.name for config in _configs(tables) if feature in config.feature_names)
    shifts = getattr(embedding, "first_rows", None)
    first = shifts[feature] if shifts else 0
    held = tables.embedding_bags if isinstance(tables, EmbeddingBagCollection) else tables.embeddings
    weight: Tensor = held[name].weight.detach().cpu()
    return weight[first : first + rows]
