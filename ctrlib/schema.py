"""What the columns of a data set mean: the contract between preparation, loader and model.

A `Schema` is a plain, immutable description: features in a fixed order (the *schema's order*, used everywhere),
labels, sample weight and group. Before preparation it says what the user wants; `ctrlib.prepare` returns a fitted copy
(table sizes and numeric parameters filled in) and stores it as `schema.json` in the prepared folder. The hash covers
everything that changes the meaning of an id or a number, so a model can refuse data prepared differently.

>>> schema = Schema(
...     features=(Categorical("item", min_count=2), Numeric("price", transform="log")),
...     labels=("click",),
... )
>>> schema["item"].min_count
2
>>> [feature.name for feature in schema.sparse], [feature.name for feature in schema.dense]
(['item'], ['price'])
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from ctrlib.errors import CtrlibError, UnknownNameError, WrongTypeError, check_path, check_type
from ctrlib.making import settle

# Three reserved ids in every vocabulary, distinct from each other and from every value of the data.
PADDING_ID = 0  # no value at all: never looked up, only there so that padded layouts have a neutral id
MISSING_ID = 1  # the cell was empty (null, or one of the missing tokens)
OOV_ID = 2  # a value that the training split does not hold often enough to have a row of its own
NUM_RESERVED_IDS = 3
MISSING_RAW_ID = -(2**63)  # an empty cell of a `RawId`, which has no vocabulary

SCHEMA_VERSION = 1

NumericTransform = Literal["none", "log", "log_standard", "log_squared", "minmax", "standard"]
Pooling = Literal["mean", "sum"]
RawForm = Literal["integer", "text"]
# How numbers and histories become fields of a model (`ctrlib.inputs.Inputs`).
NumericFields = Literal["vector", "bucketised", "piecewise_linear", "periodic", "autodis"]
BINNED = ("bucketised", "piecewise_linear")  # those that want edges
SequenceFields = Literal["pooled", "mean", "din", "din_softmax", "bst", "sim", "tim", "tim_shared"]


@dataclass(frozen=True)
class Categorical:
    """One id per row.

    `min_count`: values rarer than this in train share the out-of-vocabulary id. `max_values`: keep only the most
    frequent (None: all). `vocabulary`: name of the vocabulary, shared by features that name the same one (default: the
    feature's own name). `bucket="log_squared"` first turns a number x into floor(log(x)^2) if x > 2 else floor(x), as
    the Criteo winners did. `num_embeddings` (rows, reserved ids included) is filled in by preparation.
    """

    name: str
    min_count: int = 1
    max_values: int | None = None
    vocabulary: str | None = None
    bucket: Literal["log_squared"] | None = None
    num_embeddings: int | None = None


@dataclass(frozen=True)
class MultiValued:
    """An unordered bag of ids per row, such as genres; `pooling` makes one vector of it.

    Text is split at `separator`; a cell that begins with "[" and ends with "]" is a JSON list instead. List columns are
    taken as they are. Empty values are dropped, and so are those whose text is `padding`. Of the others the first
    `max_length` are kept. A cell that is missing, or of which nothing is left, is the bag [missing id]. Other arguments
    as in `Categorical`.
    """

    name: str
    separator: str = "|"
    max_length: int = 50
    pooling: Pooling = "mean"
    min_count: int = 1
    max_values: int | None = None
    vocabulary: str | None = None
    padding: str | None = None
    num_embeddings: int | None = None


@dataclass(frozen=True)
class Sequence:
    """An ordered history of ids per row, oldest first; the *last* `max_length` events are kept.

    Usually shares the `vocabulary` of the item it is compared with. Cells are read as in `MultiValued`, but events keep
    their places: an empty or null one is the missing id, so that "a||c" goes with "x|y|". Events whose text is
    `padding` are dropped as if they were not there ("" stands for empty ones). A missing or empty cell is an empty
    history. Other arguments as in `MultiValued`.
    """

    name: str
    separator: str = "|"
    max_length: int = 50
    pooling: Pooling = "mean"
    min_count: int = 1
    max_values: int | None = None
    vocabulary: str | None = None
    padding: str | None = None
    num_embeddings: int | None = None


@dataclass(frozen=True)
class Numeric:
    """One number per row, transformed; parameters are fitted on train and stored in `parameters`.

    `transform`: "none"; "log": sign(x) log(1 + |x|); "log_squared": log(x)^2 if x > 2 else x (AutoInt, section 5.1);
    "minmax": (x - min) / (max - min); "standard": (x - mean) / sd; "log_standard": "log", then "standard". A missing
    cell becomes `parameters["fill"]`, the train mean *after* the transform (0 for the standardised ones).
    """

    name: str
    transform: NumericTransform = "standard"
    parameters: dict[str, float] | None = None


@dataclass(frozen=True)
class RawId:
    """One 64-bit id per row as it is in the log, without vocabulary; which row of a table it reads, the embedding
    decides (`ctrlib.embeddings.ManagedEmbedding`).

    No id is reserved; a missing cell is an id of its own, -2^63. `form`, unless given, is filled in by preparation:
    "integer" if every value of train is one, or the text of one as integers are printed ("12", not "012" or "12.0");
    ids are those integers, from 2^63 on less 2^64, so that the bits are the same. Otherwise "text": the id is the
    8-byte BLAKE2b digest of the text in UTF-8, read as a signed little-endian integer. Among n texts, two have one id
    with probability n^2 / 2^65. Columns of the other form are refused, those of valid, test and prediction too.

    >>> list(Schema((RawId("user"), Categorical("item")), ("click",)).vocabularies)
    ['item']
    """

    name: str
    form: RawForm | None = None
    # For all who ask any sparse feature: it has neither of these, and one id is its own sum.
    vocabulary: ClassVar[None] = None
    num_embeddings: ClassVar[None] = None
    pooling: ClassVar[Pooling] = "sum"


VocabularyFeature = Categorical | MultiValued | Sequence
SparseFeature = VocabularyFeature | RawId
Feature = SparseFeature | Numeric
_KINDS: dict[str, type[Any]] = {
    "categorical": Categorical,
    "multi_valued": MultiValued,
    "sequence": Sequence,
    "numeric": Numeric,
    "raw_id": RawId,
}
_KIND_NAMES = {cls: name for name, cls in _KINDS.items()}


def kind_of(feature: Feature) -> str:
    """The feature's kind as schema.json spells it.

    >>> kind_of(MultiValued("genres"))
    'multi_valued'
    """
    return _KIND_NAMES[type(feature)]


def vocabulary_of(feature: SparseFeature) -> str:
    """The vocabulary, and so the embedding table, that a feature's ids belong to; a `RawId` has a table of its own.

    >>> vocabulary_of(Sequence("history", vocabulary="item")), vocabulary_of(Categorical("item"))
    ('item', 'item')
    """
    return feature.vocabulary or feature.name


class SchemaError(CtrlibError, ValueError):
    """Data or model does not fit the schema; the message says what was expected, what came and how to mend it."""


@dataclass(frozen=True)
class Schema:
    """Features in order, labels, and optionally the columns that hold the sample weight and the group (for GAUC).

    Filled in by preparation: `vocabulary_hashes` (vocabulary name -> hash of its values in order), and `raw_format`,
    the arguments with which raw files were read (missing tokens, separator and the like), so that a saved model reads
    new files the same way. The latter says nothing about ids and numbers and is not part of the hash.

    Raises:
        SchemaError: a name is used twice, there is no feature or no label, features that share a vocabulary disagree on
            `num_embeddings`, or a feature wants to share the vocabulary of a `RawId`, which has none.
    """

    features: tuple[Feature, ...]
    labels: tuple[str, ...]
    weight: str | None = None
    group: str | None = None
    vocabulary_hashes: dict[str, str] | None = None
    raw_format: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_type("a sequence of features", Iterable, features=self.features)
        for feature in self.features:
            check_type("a feature such as ctr.Categorical(name) or ctr.Numeric(name)", Feature, feature=feature)
            check_type("the name of a column", str, name=feature.name)
        labels: object = self.labels
        if isinstance(labels, str):
            raise WrongTypeError(f"labels must be a tuple of names of columns, got a text: write ({labels!r},)")
        check_type("a tuple of names of columns", Iterable, labels=self.labels)
        object.__setattr__(self, "features", tuple(self.features))
        object.__setattr__(self, "labels", tuple(self.labels))
        if not self.features or not self.labels:
            raise SchemaError(
                f"a schema needs at least one feature and one label, got {len(self.features)} and {len(self.labels)}"
            )
        names = [feature.name for feature in self.features] + list(self.labels)
        names += [self.weight] if self.weight else []
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SchemaError(
                f"columns {twice} are used more than once among features, labels and weight: use each column once"
            )
        for feature in self.features:
            _check_arguments(feature)
            if isinstance(feature, RawId) and feature.name in self.vocabularies:
                sharers = [sharer.name for sharer in self.vocabularies[feature.name]]
                raise SchemaError(
                    f"features {sharers} have vocabulary={feature.name!r}, but {feature.name!r} is a RawId, without "
                    "vocabulary: name another, or make it a Categorical"
                )
        sizes: dict[str, int | None] = {}
        for feature in self.sparse:
            vocabulary = vocabulary_of(feature)
            if sizes.setdefault(vocabulary, feature.num_embeddings) != feature.num_embeddings:
                raise SchemaError(
                    f"features that share vocabulary {vocabulary!r} must agree on num_embeddings, "
                    f"got {sizes[vocabulary]} and {feature.num_embeddings} ({feature.name!r})"
                )

    @functools.cached_property
    def sparse(self) -> tuple[SparseFeature, ...]:
        """Features that are looked up in tables, in the schema's order."""
        return tuple(feature for feature in self.features if not isinstance(feature, Numeric))

    @functools.cached_property
    def dense(self) -> tuple[Numeric, ...]:
        """Numeric features, in the schema's order."""
        return tuple(feature for feature in self.features if isinstance(feature, Numeric))

    @property
    def vocabularies(self) -> dict[str, tuple[VocabularyFeature, ...]]:
        """Vocabulary name -> the features that share it, in the order of first use."""
        groups: dict[str, list[VocabularyFeature]] = {}
        for feature in self.sparse:
            if not isinstance(feature, RawId):
                groups.setdefault(vocabulary_of(feature), []).append(feature)
        return {name: tuple(features) for name, features in groups.items()}

    @property
    def is_fitted(self) -> bool:
        """Whether preparation has filled in every table size, form of raw ids and numeric parameter."""
        return all(
            (feature.form if isinstance(feature, RawId) else feature.num_embeddings) is not None
            for feature in self.sparse
        ) and all(feature.parameters is not None for feature in self.dense)

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise UnknownNameError(f"no feature {name!r}; the schema has {[feature.name for feature in self.features]}")

    def position(self, name: str) -> int:
        """Index of a feature among the F fields, for towers that need certain fields.

        >>> Schema((Categorical("a"), Categorical("b")), ("y",)).position("b")
        1
        """
        return self.features.index(self[name])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description, with version and hash."""
        body = self._body()
        return {"version": SCHEMA_VERSION, "hash": _hash(body), **body, "raw_format": self.raw_format}

    def _body(self) -> dict[str, Any]:
        return {
            "features": [{"kind": kind_of(feature), **_arguments(feature)} for feature in self.features],
            "labels": list(self.labels),
            "weight": self.weight,
            "group": self.group,
            "vocabulary_hashes": self.vocabulary_hashes,
        }

    @property
    def hash(self) -> str:
        """16 hexadecimal digits; where it is equal, the same id and the same number mean the same thing."""
        return _hash(self._body())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schema:
        """The inverse of `to_dict`; refuses a file of another version, of unknown kinds, or edited by hand.

        Raises:
            SchemaError: as said.
        """
        if not isinstance(data, dict):
            raise SchemaError(f"a schema is an object with version and features, this is {reprlib.repr(data)}")
        if data.get("version") != SCHEMA_VERSION:
            raise SchemaError(
                f"schema version {data.get('version')!r} cannot be read, this ctrlib reads {SCHEMA_VERSION}: "
                "prepare the data again"
            )
        keys = ("features", "labels", "weight", "group", "vocabulary_hashes", "raw_format")
        if missing := [key for key in keys if key not in data]:
            raise SchemaError(f"the schema has no {', '.join(missing)}: the file was edited; prepare the data again")
        try:
            features = tuple(_feature(dict(entry)) for entry in data["features"])
            schema = cls(features, tuple(data["labels"]), *(data[key] for key in keys[2:]))
            digits = schema.hash
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, SchemaError):
                raise
            raise SchemaError(
                f"the schema cannot be understood ({error}): the file was edited; prepare the data again"
            ) from error
        if data.get("hash") != digits:
            raise SchemaError(
                f"schema hash is {data.get('hash')!r} but its content hashes to {digits!r}: "
                "the file was edited or damaged; prepare the data again"
            )
        return schema

    def save(self, path: Path, *, manifest: bool = False) -> None:
        """Write schema.json; with `manifest` it says that its folder has a MANIFEST, or is not whole."""
        content = {**self.to_dict(), **({"manifest": True} if manifest else {})}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read schema.json, or the schema.json inside a prepared folder.

        Raises:
            SchemaError: there is no such file, or it is not a schema.
        """
        check_path("a prepared folder", folder=path)
        path = Path(path)
        if path.is_dir():
            settle(path)
            path = path / "schema.json"
        if not path.is_file():
            raise SchemaError(f"{path} does not exist: not a prepared folder; make one with `ctrlib prepare`")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"{path} is not JSON ({error}): prepare the data again") from error
        try:
            return cls.from_dict(data)
        except SchemaError as error:
            raise SchemaError(f"{path}: {error}") from error

    def difference(self, other: Schema) -> list[str]:
        """What differs between two schemas, a line each; empty if they are the same."""
        lines = []
        mine = {feature.name: feature for feature in self.features}
        theirs = {feature.name: feature for feature in other.features}
        lines += [f"feature {name!r} is missing" for name in mine if name not in theirs]
        lines += [f"feature {name!r} is extra" for name in theirs if name not in mine]
        for name in (name for name in mine if name in theirs):
            a, b = ({"kind": kind_of(f), **_arguments(f)} for f in (mine[name], theirs[name]))
            keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
            lines += [f"feature {name!r}: {key} is {b.get(key)!r}, expected {a.get(key)!r}" for key in keys]
        if not lines and list(mine) != list(theirs):
            lines.append(f"feature order is {list(theirs)}, expected {list(mine)}")
        for field in ("labels", "weight", "group", "vocabulary_hashes"):
            if getattr(self, field) != getattr(other, field):
                lines.append(f"{field} is {getattr(other, field)!r}, expected {getattr(self, field)!r}")
        return lines


# Argument -> what it may be; "at least 1" for whole numbers. A misspelt choice must not select another behaviour.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "transform": get_args(NumericTransform),
    "pooling": get_args(Pooling),
    "bucket": (None, "log_squared"),
    "form": (None, *get_args(RawForm)),
}
_COUNTS = ("min_count", "max_values", "max_length")


def _feature(arguments: dict[str, Any]) -> Feature:
    """A feature as schema.json has it; what this version does not know is refused, since it means something."""
    kind = arguments.pop("kind", None)
    if kind not in _KINDS:
        raise SchemaError(f"unknown feature kind {kind!r}, expected one of {sorted(_KINDS)}")
    if unknown := sorted(arguments.keys() - {field.name for field in dataclasses.fields(_KINDS[kind])}):
        raise SchemaError(
            f"feature {arguments.get('name')!r} has {', '.join(unknown)}, which this ctrlib does not know: a newer one "
            "wrote it; install that, or prepare the data again"
        )
    feature: Feature = _KINDS[kind](**arguments)
    return feature


def _arguments(feature: Feature) -> dict[str, Any]:
    """What schema.json holds, and what is hashed; without a padding that there is not, so that older hashes stay."""
    return {
        name: value for name, value in dataclasses.asdict(feature).items() if name != "padding" or value is not None
    }


def _check_arguments(feature: Feature) -> None:
    for name, value in dataclasses.asdict(feature).items():
        if name in _CHOICES and value not in _CHOICES[name]:
            raise SchemaError(f"feature {feature.name!r}: {name} is {value!r}, expected one of {_CHOICES[name]}")
        if name in _COUNTS and value is not None and value < 1:
            raise SchemaError(f"feature {feature.name!r}: {name} is {value}, expected 1 or more")
        if name == "separator" and not (isinstance(value, str) and value):
            raise SchemaError(f"feature {feature.name!r}: separator is {value!r}, expected a text such as '|' or ','")
        if name == "padding" and value is not None and not (isinstance(value, str) and value == value.strip()):
            raise SchemaError(
                f"feature {feature.name!r}: padding is {value!r}, expected the text of an event, without blanks around "
                "it, such as '0'"
            )


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
