"""Hash functions that decide which rows of a table an id reads: the same on every machine, in every run.

Any 64-bit id goes through splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014, https://doi.org/10.1145/2660193.2660195) with a seed of its own for each look-up, and the upper 32 bits of the
result are scaled to the number of rows (Lemire, "Fast random integer generation in an interval", TOMACS 2019,
https://doi.org/10.1145/3230636: a multiplication in place of a division). Seeds come from names, so that features may
be added, removed and reordered. Everything is integer arithmetic of tensors: it runs on any device with the same bits,
and `torch.export` follows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.errors import ArgumentError

# As signed integers: torch multiplies modulo 2^64.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
MAX_ROWS = 2**31 - 1  # 32 bits of hash times the rows must fit in 63 bits


@dataclass(frozen=True)
class Lookup:
    """A row for every id x of `feature`: first_row + (h(x; seed) + step) mod num_embeddings.

    `key` names the look-up in the KeyedJaggedTensor of rows. Look-ups of one seed and steps 0, 1, 2, ... read
    neighbouring rows.

    Raises:
        ValueError: `num_embeddings` is not in 1 ... 2^31 - 1, or `step` is negative.
    """

    feature: str
    key: str
    seed: int
    num_embeddings: int
    first_row: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_embeddings <= MAX_ROWS or self.step < 0:
            raise ArgumentError(
                f"look-up {self.key!r}: expected 1 to {MAX_ROWS} rows and a step of 0 or more, got "
                f"num_embeddings={self.num_embeddings} and step={self.step}"
            )


def seed_of(space: str, name: str, chunk: int) -> int:
    """A 64-bit seed, as a signed integer: the 8-byte BLAKE2b digest of "space|name|chunk", little-endian.

    `space` keeps methods apart, `name` is that of a vocabulary, so that features that share it read the same rows.

    >>> seed_of("ctrlib/ue/v1", "item", 0), seed_of("ctrlib/ue/v1", "item", 1)
    (-6862413779226027310, -4010409722534505989)
    """
    digest = hashlib.blake2b(f"{space}|{name}|{chunk}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def splitmix64(values: Tensor, seed: int | Tensor) -> Tensor:
    """The x-th output of the splitmix64 generator that starts at `seed`, for each x of `values`: 64 random bits.

    For one seed this is a permutation of all 64-bit integers.

    Shape: any, int64; a `seed` that is a tensor is broadcast.

    >>> [bits % 2**64 for bits in splitmix64(torch.tensor([1, 2]), 1234567).tolist()]
    [6457827717110365317, 3203168211198807973]
    """
    return _mix(values.long() * _GOLDEN + seed)


def rows_of(values: Tensor, seed: int | Tensor, num_embeddings: int | Tensor) -> Tensor:
    """A row in [0, num_embeddings) for each of `values`: the upper 32 bits of `splitmix64`, scaled.

    With M rows, their probabilities differ by less than M / 2^32 of themselves.

    Shape: any, int64; tensors are broadcast.

    >>> rows_of(torch.tensor([0, -1, 2**62]), seed_of("ctrlib/ue/v1", "item", 0), 1000).tolist()
    [377, 135, 111]
    """
    return (_upper(splitmix64(values, seed)) * num_embeddings) >> 32


def hash_bags(sparse: KeyedJaggedTensor, lookups: Sequence[Lookup]) -> KeyedJaggedTensor:
    """The rows of every look-up, under its key: bags as those of its feature, weights too if there are any.

    Raises:
        ValueError: a look-up is of a feature that `sparse` lacks.

    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([7, 8, 7]), torch.tensor([2, 0, 0, 1]))
    >>> rows = hash_bags(kjt, [Lookup("b", "b#0", 5, 100), Lookup("a", "a#0", 5, 100), Lookup("a", "a#1", 6, 100)])
    >>> rows.keys(), rows.lengths().tolist(), rows.values().tolist()
    (['b#0', 'a#0', 'a#1'], [0, 1, 2, 0, 2, 0], [98, 98, 51, 19, 20])
    """
    bags = repeat_bags(sparse, [lookup.feature for lookup in lookups], [lookup.key for lookup in lookups])
    rows = bags.values()  # a copy, and worked on in place: new memory for each step would cost more than the steps
    of_each = list(rows.split(bags.length_per_key()))
    rows *= _GOLDEN
    torch._foreach_add_(of_each, [lookup.seed for lookup in lookups])
    rows.copy_(_upper(_mix(rows)))
    torch._foreach_mul_(of_each, [lookup.num_embeddings for lookup in lookups])
    rows >>= 32
    for part, lookup in zip(of_each, lookups):
        if lookup.step:
            part += lookup.step
            part %= lookup.num_embeddings
    torch._foreach_add_(of_each, [lookup.first_row for lookup in lookups])
    return bags


def repeat_bags(sparse: KeyedJaggedTensor, features: Sequence[str], keys: Sequence[str]) -> KeyedJaggedTensor:
    """The bags of each of `features`, in new memory and as int64, under the key in the same place of `keys`.

    Raises:
        ValueError: `sparse` lacks a feature.

    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([7, 8, 9]), torch.tensor([2, 0, 0, 1]))
    >>> bags = repeat_bags(kjt, ["b", "a", "b"], ["x", "y", "z"])
    >>> bags.keys(), bags.lengths().tolist(), bags.values().tolist()
    (['x', 'y', 'z'], [0, 1, 2, 0, 0, 1], [9, 7, 8, 9])
    """
    place = {key: position for position, key in enumerate(sparse.keys())}
    missing = sorted(set(features) - place.keys())
    if missing:
        raise ArgumentError(f"the batch has features {sparse.keys()}, without {missing} that this module looks up")
    sources = [place[feature] for feature in features]
    counts = sparse.length_per_key()
    values = sparse.values().long().split(counts)
    weights = sparse.weights_or_none()
    if weights is not None:
        of_each = weights.split(counts)
        weights = torch.cat([of_each[source] for source in sources])
    return KeyedJaggedTensor(
        list(keys),
        torch.cat([values[source] for source in sources]),
        weights,
        lengths=sparse.lengths().view(len(place), sparse.stride())[sources].flatten(),
        stride=sparse.stride(),
        length_per_key=[counts[source] for source in sources],
    )


def _mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64, in place: David Stafford's mix 13."""
    for shift, factor in _FACTORS:
        bits ^= (bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # torch's >> brings copies of the sign in
        bits *= factor
    bits ^= (bits >> 31).bitwise_and_(2**33 - 1)
    return bits


def _upper(bits: Tensor) -> Tensor:
    """The upper 32 of 64 bits, as a number."""
    return (bits >> 32).bitwise_and_(2**32 - 1)
