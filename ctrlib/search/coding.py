"""Transform coding of a trained model's tables: the fewest bits for what the predictions depend on.

Quantising a table moves every row e_v by some delta_v, and so the loss of a row of data by about
1/2 p (1 - p) (g^T delta_v)^2, where p is the prediction and g the gradient of the logit with respect to the looked-up
vector (second order, Gauss-Newton: the second derivative of log-loss in its logit is p (1 - p)). Averaged over the data
the damage is 1/2 sum_v n_v delta_v^T H delta_v, n_v being how often id v is read, and H = E[p (1 - p) g g^T]. In the
coordinates H^(1/2) e that is a plain squared error, for which the best code is known: the principal axes of the rows,
weighted by how often they are read, and bits by reverse water-filling, one for every factor of 4 in variance
(T. Cover and J. Thomas, "Elements of Information Theory", section 10.3.3). One number, the damage in nats, then decides
everything: axes, bits of each coordinate, bytes of a row in each table, and how many rows are worth keeping.

To weigh by H is the idea of optimal brain surgery (B. Hassibi and D. Stork, NIPS 1992), applied to rows. It is what
counts: DCN V2 on MovieLens-1M with ids, width 32, 4 bytes a row, loses .0008 of validation AUC with it, .0015 without.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from ctrlib.batch import Batch
from ctrlib.embeddings.packed import PackedTable, PackedTables
from ctrlib.embeddings.small_events import PackedEvents
from ctrlib.errors import ArgumentError
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS
from ctrlib.search.bytes import bytes_of
from ctrlib.search.plan import Plan, materialise
from ctrlib.sharding.plan import TABLES, tables_of
from ctrlib.structure import unstack

TableConfig: TypeAlias = EmbeddingBagConfig | EmbeddingConfig

# Mean squared error of the best uniform quantiser of a unit normal, for 0, 1, ... 8 bits (J. Max, "Quantizing for
# minimum distortion", IRE Transactions on Information Theory 6, 1960, table II, up to 5 bits; from there on computed).
ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.00349, 0.00104, 0.000304, 0.0000877)
MAX_BYTES = 8  # a row


@dataclass(frozen=True)
class Usage:
    """How the data use a table: `reads` (rows,), how often a row of data reads each of its rows on average, and
    `metric` (D, D), H above."""

    reads: Tensor
    metric: Tensor


def usage(model: Model, batches: Iterable[Batch], *, gradient_batches: int = 32) -> dict[str, Usage]:
    """Watch a model's tables at work: name of a table's weight -> its usage.

    Reads are counted in all `batches`, gradients taken in the first `gradient_batches` of them. With several labels
    g g^T is summed over them, by random signs, which takes one backward pass.

    Raises:
        ValueError: no batch came.
    """
    tables = tables_of(model)
    collections = {path: part for path, part, _ in tables.values()}
    owners = {(path, feature): name for name, (path, _, config) in tables.items() for feature in config.feature_names}
    reads = {name: torch.zeros(config.num_embeddings) for name, (_, _, config) in tables.items()}
    metrics = {name: torch.zeros((config.embedding_dim,) * 2).double() for name, (_, _, config) in tables.items()}
    seen: list[_LookUp] = []

    def watching(path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[KeyedJaggedTensor], found: Any) -> Any:
            if isinstance(found, KeyedTensor):
                keys, widths = found.keys(), found.length_per_key()
                leaf = found.values().detach().requires_grad_(torch.is_grad_enabled())
                seen.append(_LookUp(path, arguments[0], leaf, lambda x: KeyedTensor(keys, widths, x).to_dict()))
                return KeyedTensor(keys, widths, leaf)
            counts = [len(events.values()) for events in found.values()]
            leaf = torch.cat([events.values() for events in found.values()]).detach()
            leaf.requires_grad_(torch.is_grad_enabled())
            seen.append(_LookUp(path, arguments[0], leaf, lambda x: dict(zip(found, torch.split(x, counts)))))
            return {
                name: JaggedTensor(values, lengths=events.lengths(), offsets=events.offsets())
                for (name, events), values in zip(found.items(), torch.split(leaf, counts))
            }

        return hook

    hooks = [part.register_forward_hook(watching(path)) for path, part in collections.items()]
    signs = torch.Generator().manual_seed(0)
    num_rows = num_with_gradient = 0
    was_training = model.training
    model.eval()
    try:
        for number, batch in enumerate(batches):
            seen.clear()
            num_rows += batch.size
            with_gradient = number < gradient_batches
            with torch.set_grad_enabled(with_gradient):
                logits = model(batch) if with_gradient else _look_up(model, batch)
            for look_up in seen:
                for feature, bags in look_up.ids.to_dict().items():
                    if name := owners.get((look_up.path, feature)):
                        reads[name] += torch.bincount(bags.values(), minlength=len(reads[name]))
            if not with_gradient:
                continue
            num_with_gradient += batch.size
            curvature = (torch.sigmoid(logits) * torch.sigmoid(-logits)).detach().sqrt()
            coins = torch.randint(0, 2, logits.shape, generator=signs) * 2 - 1
            gradients = torch.autograd.grad((logits * curvature * coins).sum(), [look_up.leaf for look_up in seen])
            for look_up, gradient in zip(seen, gradients):
                for feature, g in look_up.by_feature(gradient.double()).items():
                    name = owners[look_up.path, feature]
                    config = tables[name][2]
                    if isinstance(config, EmbeddingConfig):  # each event's gradient is its own
                        metrics[name] += g.T @ g
                        continue
                    lengths = look_up.ids[feature].lengths().double()
                    # A row of a bag of L moves its sum by what it moves itself, its mean by 1 / L of that: over the bag
                    # the squares add up to L and 1 / L (nothing, if it is empty).
                    is_mean = config.pooling == PoolingType.MEAN
                    weight = lengths.clamp(max=1) / lengths.clamp(min=1) if is_mean else lengths
                    metrics[name] += (g * weight[:, None]).T @ g
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not num_with_gradient:
        raise ArgumentError("no batch came, so that nothing is known of how tables are used: pass some of train")
    found = {}
    for name, count in reads.items():
        per_row = count.double() / num_rows
        found[name] = Usage(per_row, metrics[name] / num_with_gradient / per_row.sum().clamp(min=1e-12))
    return found


class _LookUp(NamedTuple):
    """One call of a collection: its ids, what was found as one leaf of the graph, and how that is split by feature."""

    path: str
    ids: KeyedJaggedTensor
    leaf: Tensor
    by_feature: Callable[[Tensor], dict[str, Tensor]]


def _look_up(model: Model, batch: Batch) -> Tensor:
    """Only read the tables."""
    fields: Tensor = model.embedding(batch)
    return fields if model.wide is None else model.wide(batch)


def pooling_in(config: TableConfig) -> Literal["sum", "mean"]:
    """How a table's bags are pooled; where events come one by one, no matter what is said."""
    return "mean" if getattr(config, "pooling", None) == PoolingType.MEAN else "sum"


def packed(part: nn.Module, tables: Sequence[PackedTable]) -> tuple[str, PackedTables]:
    """What takes the place of a collection with these tables, still without rows, and its kind in `structure.KINDS`.

    Raises:
        ArgumentError: it is read with a weight for each id, as the tables are that some searches leave.
    """
    if getattr(part, "is_weighted", bool)():
        raise ArgumentError(
            f"the tables of {tables[0].feature_names[0]!r} and others are read with weights, as a search has left "
            "them, and packed rows have none: compress a model with all of its rows"
        )
    names = [name for table in tables for name in table.feature_names]
    if isinstance(part, EmbeddingCollection):
        return "packed_events", PackedEvents(tables, names=names)
    return "packed", PackedTables(tables, names=names)


def transform_coding(
    model: Model,
    batches: Iterable[Batch],
    *,
    num_bytes: int,
    gradient_batches: int = 32,
    smoothing: float = 0.1,
) -> Plan:
    """The plan of least damage in which all but the network takes `num_bytes`.

    Each table keeps its rows in float16 or coded in one byte or more, from its most frequent one to one that is not
    worth its bytes; the rows after that share a single one, their mean. All choices are made at one price for a byte,
    and the price is sought at which the budget is met. A target and its histories, which attention reads event by event
    (EmbeddingCollection), are one table.

    Args:
        model: trained; it is not changed.
        batches: of train, to see how tables are used: 100,000 rows or more.
        num_bytes: the budget for codes, decoders, remaps and vectors of numbers together.
        gradient_batches: see `usage`.
        smoothing: reads that every row has beside those counted, in rows of data: rows never seen would get no bits.

    Raises:
        ValueError: there are no tables, or the budget cannot be met; the message says what the smallest one is.
    """
    model = copy.deepcopy(model)
    unstack(model)
    if not any(isinstance(part, TABLES) for part in model.modules()):
        raise ArgumentError("the model has no tables to code: they are coded already")
    num_rows = 0

    def counted() -> Iterable[Batch]:
        nonlocal num_rows
        for batch in batches:
            num_rows += batch.size
            yield batch

    used = usage(model, counted(), gradient_batches=gradient_batches)
    weights = dict(model.named_parameters())
    coders = [
        TableCoder(path, part, config, weights[name].detach(), used[name], smoothing / num_rows)
        for name, (path, part, config) in tables_of(model).items()
    ]

    smallest = [min(coder.choices, key=lambda choice: (choice.num_bytes, choice.damage)) for coder in coders]
    plan = _plan(coders, smallest)
    # Beside the tables' own bytes there are vectors of numbers, and what says where tables begin and end. The latter
    # depends a little on the choices, so that what they add up to is seen afterwards.
    needed = bytes_of(materialise(model, plan)).embedding
    if needed > num_bytes:
        raise ArgumentError(
            f"the embeddings cannot be stored in {num_bytes:,} bytes, {needed:,} is the smallest feasible budget: ask "
            "for that much, or train with a smaller embedding_dim"
        )
    room = num_bytes - (needed - sum(choice.num_bytes for choice in smallest))
    while room >= sum(choice.num_bytes for choice in smallest):
        larger = _plan(coders, choose(coders, room))
        excess = bytes_of(materialise(model, larger)).embedding - num_bytes
        if excess <= 0:
            return larger
        room -= excess
    return plan


def _plan(coders: list[TableCoder], chosen: list[Choice]) -> Plan:
    replaced: dict[str, dict[str, Any]] = {}
    weights: dict[str, Tensor] = {}
    for path in dict.fromkeys(coder.path for coder in coders):
        mine = [(coder, choice) for coder, choice in zip(coders, chosen) if coder.path == path]
        kind, made = packed(mine[0][0].part, [coder.describe(choice) for coder, choice in mine])
        for coder, choice in mine:
            made.fill(coder.config.name, *coder.encode(choice))
        replaced[path] = {"kind": kind, **made.describe()}
        weights |= {f"{path}.{name}": tensor for name, tensor in made.state_dict().items()}
    return Plan("transform_coding", replaced, weights, {"damage": sum(choice.damage for choice in chosen)})


class Choice(NamedTuple):
    """One way to store a table: bytes of a row (0: float16 rows), how many of the first rows, and what that costs."""

    row_bytes: int
    rows: int
    num_bytes: int
    damage: float


def choose(coders: list[TableCoder], num_bytes: int) -> list[Choice]:
    """For each table the choice that costs least at one price for a byte, at the price that meets the budget."""

    def at(price: float) -> list[Choice]:
        return [min(coder.choices, key=lambda c: c.damage + price * c.num_bytes) for coder in coders]

    low, high = -40.0, 40.0  # logarithms of the price: almost nothing, and more than any damage
    for _ in range(70):
        middle = (low + high) / 2
        if sum(choice.num_bytes for choice in at(math.exp(middle))) > num_bytes:
            low = middle
        else:
            high = middle
    chosen = at(math.exp(high))
    total = sum(choice.num_bytes for choice in chosen)
    # A price finds the corners of the trade-off only; what is left of the budget buys the best single steps.
    while True:
        steps = [
            ((old.damage - new.damage) / (new.num_bytes - old.num_bytes), place, new)
            for place, (coder, old) in enumerate(zip(coders, chosen))
            for new in coder.choices
            if old.num_bytes < new.num_bytes <= old.num_bytes + num_bytes - total and new.damage < old.damage
        ]
        if not steps:
            return chosen
        _, place, new = max(steps, key=lambda step: step[0])
        total += new.num_bytes - chosen[place].num_bytes
        chosen[place] = new


class TableCoder:
    """Everything about one table: its axes, what each choice costs, and its codes."""

    def __init__(
        self, path: str, part: nn.Module, config: TableConfig, weight: Tensor, used: Usage, smoothing: float
    ) -> None:
        self.path, self.part, self.config = path, part, config
        self.weight = weight.float()
        self.reads = used.reads.float() + smoothing
        values, vectors = torch.linalg.eigh(used.metric)
        if values[-1] <= 0:  # nothing depends on this table
            values = torch.ones_like(values)
        values = values.clamp(min=1e-4 * values[-1].item())
        root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
        self.back = inverse.float()
        scaled = self.weight @ root.float()
        p = self.reads / self.reads.sum()
        self.mean = p @ scaled
        centred = scaled - self.mean
        energies, axes = torch.linalg.eigh(((centred * p[:, None]).T @ centred).double())
        self.energies, self.axes = energies.flip(0).clamp(min=0), axes.flip(1).float()
        self.coordinates = centred @ self.axes  # in units of damage, the strongest first
        self.codings = {size: self._code(size) for size in range(1, self._most_bytes() + 1)}
        self.choices = list(self._choices())

    def _most_bytes(self) -> int:
        """Beyond two bytes a coordinate, or as many coordinates as rows, nothing is gained."""
        return min(MAX_BYTES, 2 * int(self.config.embedding_dim) - 1)

    def _choices(self) -> Iterable[Choice]:
        rows, width = self.weight.shape
        reads, cut = self.reads.double(), self._cuts()
        # Damage of rows k and after if all read their mean: their spread around it.
        back = torch.stack([reads, reads * self.coordinates.double().square().sum(1)], 1).flip(0).cumsum(0).flip(0)
        sums = (reads[:, None] * self.coordinates).flip(0).cumsum(0).flip(0)
        spread = back[:, 1] - sums.square().sum(1) / back[:, 0]
        dropped = {k: 0.0 if k == rows else max(0.0, 0.5 * spread[k].item()) for k in cut}
        for size, coding in {0: None, **self.codings}.items():
            kept = torch.zeros(rows) if coding is None else coding.errors
            damage = torch.cat([torch.zeros(1), 0.5 * (reads * kept).cumsum(0)])
            for k in cut:
                stored = k + (k < rows)  # and the row that the others share
                decoder = 0 if coding is None else 4 * (coding.axes.numel() + width)
                yield Choice(size, k, stored * (size or 2 * width) + decoder, damage[k].item() + dropped[k])

    def _cuts(self) -> list[int]:
        """Numbers of rows to keep that are tried: all, and from there on down by 10 % each."""
        rows, cut = len(self.weight), [len(self.weight)]
        while cut[-1] * 0.9 > max(NUM_RESERVED_IDS, 16):
            cut.append(int(cut[-1] * 0.9))
        return [k for k in cut if k == rows or k > NUM_RESERVED_IDS]

    def _code(self, size: int) -> Coding:
        """The best coding of all rows in `size` bytes each."""
        words = allocate_bits(self.energies, size)
        order = [coordinate for word in words for coordinate, _ in word]
        bits = [number for word in words for _, number in word]
        p = self.reads / self.reads.sum()
        codes = torch.stack(
            [quantise(self.coordinates[:, coordinate], p, number) for coordinate, number in zip(order, bits)], 1
        )
        # Given the codes, the best axes and offset are a weighted least-squares fit.
        design = torch.cat([codes.float(), torch.ones(len(codes), 1)], 1).double()
        target = self.coordinates.double()
        weighted = design * p.double()[:, None]
        solution = torch.linalg.lstsq(weighted.T @ design, weighted.T @ target, driver="gelsd").solution.float()
        errors = (design.float() @ solution - self.coordinates).square().sum(1)
        out = solution @ self.axes.T
        out[-1] += self.mean
        out = out @ self.back
        return Coding(tuple(tuple(number for _, number in word) for word in words), codes, out[:-1], out[-1], errors)

    def describe(self, choice: Choice) -> PackedTable:
        """The choice as `PackedTables` takes it."""
        rows = len(self.weight)
        return PackedTable(
            self.config.name,
            tuple(self.config.feature_names),
            self.config.embedding_dim,
            rows=choice.rows + (choice.rows < rows),
            bits=self.codings[choice.row_bytes].bits if choice.row_bytes else (),
            pooling=pooling_in(self.config),
            dropped_to=choice.rows if choice.rows < rows else 0,
        )

    def encode(self, choice: Choice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, axes and offset (or float16 rows alone), with the row that dropped ids share at the end."""
        k, rows = choice.rows, len(self.weight)
        weights = self.reads[k:] / self.reads[k:].sum().clamp(min=1e-30)
        if not choice.row_bytes:
            shared = [(weights @ self.weight[k:])[None]] if k < rows else []
            return torch.cat([self.weight[:k], *shared]), None, None
        coding = self.codings[choice.row_bytes]
        # The codes of the mean are the mean of the codes, to within rounding.
        shared = [(weights @ coding.codes[k:].float()).round().to(coding.codes.dtype)[None]] if k < rows else []
        return torch.cat([coding.codes[:k], *shared]), coding.axes, coding.offset


@dataclass(frozen=True)
class Coding:
    """A table in so many bytes a row: bits by word, codes (rows, J), axes (J, D), offset (D,), and what each row's
    error (rows,) costs when it is read, in twice the damage."""

    bits: tuple[tuple[int, ...], ...]
    codes: Tensor
    axes: Tensor
    offset: Tensor
    errors: Tensor


def allocate_bits(energies: Tensor, num_bytes: int) -> list[list[tuple[int, int]]]:
    """Which coordinates get how many bits, by words of at most 4 bytes: [(coordinate, bits), ...] for each.

    Bit by bit to where it takes most off the error; a coordinate lies in one word.

    >>> allocate_bits(torch.tensor([16.0, 4.0, 1.0, 0.1]), 1)
    [[(0, 4), (1, 3), (2, 1)]]
    """
    room = [32] * (num_bytes // 4) + [8 * (num_bytes % 4)] * (num_bytes % 4 > 0)
    bits = [0] * len(energies)
    word_of: dict[int, int] = {}
    energy = energies.tolist()
    while True:
        best = (0.0, -1, -1)
        widest = max(range(len(room)), key=room.__getitem__)
        for coordinate, used in enumerate(bits):
            word = word_of.get(coordinate, widest)
            if used < len(ERROR) - 1 and room[word]:
                best = max(best, (energy[coordinate] * (ERROR[used] - ERROR[used + 1]), coordinate, word))
        _, coordinate, word = best
        if coordinate < 0:
            break
        bits[coordinate] += 1
        room[word] -= 1
        word_of[coordinate] = word
    words = [[(c, bits[c]) for c in sorted(word_of) if word_of[c] == word] for word in range(len(room))]
    return [word for word in words if word] or [[(0, 1)]]


def quantise(values: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Codes in [0, 2^bits) of a uniform quantiser, centred at 0, with the step of least weighted squared error."""
    levels = 2**bits
    spread = (weights * values.square()).sum().sqrt().clamp(min=1e-30)
    if len(values) > 20_000:  # the step is found on a sample
        chosen = torch.multinomial(weights, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
        sample, of_sample = values[chosen], torch.full((20_000,), 1 / 20_000)
    else:
        sample, of_sample = values, weights

    def codes(x: Tensor, step: Tensor) -> Tensor:
        rounded: Tensor = (x / step).floor().clamp(-levels // 2, levels // 2 - 1)
        return rounded

    steps = [2 * reach * spread / levels for reach in torch.linspace(0.6, 6.0, 55)]

    def error(step: Tensor) -> float:
        return float((of_sample * ((codes(sample, step) + 0.5) * step - sample).square()).sum())

    return codes(values, min(steps, key=error)).add(levels // 2).to(torch.int16)
