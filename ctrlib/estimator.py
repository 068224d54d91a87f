"""scikit-learn's classifier around the whole road: prepare, train, choose the epoch by validation, score.

The estimator needs nothing but a frame and labels, and goes where scikit-learn's own go: `cross_val_score`, pipelines,
searches over settings. What it learns is a model folder, which `save` writes and `ctrlib predict` reads as well.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from ctrlib._lazy import instead
from ctrlib._target import target
from ctrlib.data.prepare import prepare
from ctrlib.data.table import as_frame
from ctrlib.errors import ArgumentError, check_number, check_path, check_type, check_whole
from ctrlib.making import new_folder
from ctrlib.manifest import inside
from ctrlib.schema import Categorical, Feature, Numeric, Schema, SchemaError
from ctrlib.schema import Sequence as History
from ctrlib.serving.model_folder import model_in_the_making
from ctrlib.serving.predictor import Predictor
from ctrlib.training.defaults import config_for
from ctrlib.training.record import KEY
from ctrlib.training.run import run

SAID = "classifier.json"  # of a saved estimator: what its model folder does not hold


class CTRClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A click-through-rate model of any two classes, as a scikit-learn estimator.

    `fit` prepares the rows in a temporary folder, holds a share of them out as validation, trains with settings that
    suit the data (docs/defaults.md), and keeps the epoch that validation likes best. Where nothing is said, columns of
    a frame mean what `ctr.prepare` takes them for, and columns of an array, or of a frame that has no names for them,
    are numbers, called x0, x1 and so on. It prints nothing.

    There is no `decision_function`; `predict_proba` is what scores rank by. `score` is the accuracy, as of every
    classifier there: AUC is `cross_val_score(..., scoring="roc_auc")`.

    Args:
        model: name of a published model (`ctrlib models`).
        embedding_dim: width of the embeddings; None: by the data.
        numeric: names of columns that are numbers. As on the command line, "price:log" names a transform, too.
        categorical: names of columns of ids, one a row.
        sequence: names of columns of histories: lists, or texts with "|" between values.
        validation_fraction: share of each class's rows that chooses the epoch, and is not trained on.
        max_epochs: passes over the other rows at most; None: by the data.
        random_state: of the rows held out, initial weights, the order of rows and dropout. The same number gives the
            same bits. None, or a generator of numpy, for another one at every `fit`.
        config: what else `ctr.run` takes, as plain data: arguments of the model and, as "training", how it is trained,
            such as {"hidden": [64], "training": {"learning_rate": 1e-3}}.

    Attributes:
        classes_: the two classes, in order; the second is the one whose probability is learnt.
        n_features_in_, feature_names_in_: of what `fit` got; the latter of frames only.
        schema_: what the columns became (`ctr.Schema`).
        config_: the whole experiment, as `ctr.run` takes it.
        result_: what it gave: valid_auc, epochs, parameters, seconds and more.

    >>> import polars as pl
    >>> frame = pl.DataFrame({"item": ["a", "b", "c", "d"] * 50, "price": [1.5, 2.0, 3.5, 4.0, 2.5] * 40})
    >>> clicked = ["yes" if item in "ab" else "no" for item in frame["item"]]
    >>> classifier = CTRClassifier(model="fm", max_epochs=20).fit(frame, clicked)
    >>> classifier.classes_.tolist(), classifier.predict(frame[:4]).tolist()
    (['no', 'yes'], ['yes', 'yes', 'no', 'no'])
    """

    def __init__(
        self,
        model: str = "dcnv2",
        *,
        embedding_dim: int | None = None,
        numeric: Sequence[str] = (),
        categorical: Sequence[str] = (),
        sequence: Sequence[str] = (),
        validation_fraction: float = 0.1,
        max_epochs: int | None = None,
        random_state: int | np.random.RandomState | None = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.embedding_dim = embedding_dim
        self.numeric = numeric
        self.categorical = categorical
        self.sequence = sequence
        self.validation_fraction = validation_fraction
        self.max_epochs = max_epochs
        self.random_state = random_state
        self.config = config

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.allow_nan = True  # a missing number is the mean, a missing id an id of its own
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> CTRClassifier:
        """Learn from rows and their classes.

        Args:
            X: (rows, features): a polars or pandas frame, or an array of numbers, in which NaN is a missing one.
            y: (rows,): two classes, as numbers, texts or booleans.
            sample_weight: (rows,): of each row in the loss, 0 or more. A row of weight 0 counts as none.

        Raises:
            ValueError: there are not two classes with two rows each, or an argument is out of range.
            SchemaError: a column is not what was said, or no column is of any use.
            DataError: a cell is damaged, such as an infinite number.
            TypeError: an argument is of another type.
        """
        check_number(0, above=True, below=1, validation_fraction=self.validation_fraction)
        said = self._said()
        frame, is_array = self._frame(X, reset=True)
        if y is None:
            raise ArgumentError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        name = getattr(y, "name", None)  # of a series
        y = column_or_1d(_array(y), warn=True)
        check_classification_targets(y)
        check_consistent_length(frame, y)
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(_array(sample_weight), frame, dtype=np.float64, ensure_non_negative=True)
            kept = weights > 0
            frame, y, weights = frame.filter(kept), y[kept], weights[kept]
        self.classes_, places = np.unique(y, return_inverse=True)
        if len(self.classes_) > 2:
            raise ArgumentError(
                f"Only binary classification is supported. The type of the target is {type_of_target(y)}: "
                f"{len(self.classes_)} classes, such as {self.classes_[:3].tolist()}"
            )
        seed = self._seed()
        held_out = self._held_out(places, np.random.default_rng(seed))
        taken = set(frame.columns)
        label = _free(name if isinstance(name, str) and name else "label", taken)
        frame = frame.with_columns(pl.Series(label, places.astype(np.int8)))
        weight = None if weights is None else _free("weight", {*taken, label})
        if weight is not None:
            frame = frame.with_columns(pl.Series(weight, weights))
        with tempfile.TemporaryDirectory(prefix="ctrlib-") as temporary:
            data = Path(temporary) / "data"
            parts = {"train": frame.filter(~held_out), "valid": frame.filter(held_out)}
            features = self._features(frame.columns[: len(taken)], is_array)
            self.schema_: Schema = prepare(parts, data, features=features, labels=label, weight=weight, log=None)
            self._train(data, said, seed)
        return self

    def _said(self) -> dict[str, Any]:
        """What is said of the experiment, but for model and seed."""
        check_type("a dictionary of plain data, or None", (dict, NoneType), config=self.config)
        said = dict(self.config or {})
        check_type("a dictionary", dict, training=said.get("training", {}))
        said["training"] = training = {"checkpoint_seconds": None, **said.get("training", {})}
        if "seed" in training:
            raise ArgumentError(f"config says seed={training['seed']!r}: say it as random_state")
        for name, value, entries in (
            ("embedding_dim", self.embedding_dim, said),
            ("max_epochs", self.max_epochs, training),
        ):
            if value is not None:
                if name in entries:
                    raise ArgumentError(f"config says {name}={entries[name]!r}, and {name}={value!r}: say it once")
                entries[name] = _plain(value)
        return said

    def _train(self, data: Path, said: dict[str, Any], seed: int) -> None:
        config = config_for(data, self.model, said, seed=seed)
        made: Path = data.with_name("model")
        with torch.random.fork_rng(devices=[]):  # whoever calls keeps their random numbers
            model, self.result_ = run(data, config, score_test=False, console=Console(quiet=True))
        record = {**self.result_[KEY], "data": "rows given to CTRClassifier.fit"}  # which lie nowhere from now on
        with model_in_the_making(model, config, data, made, result={**self.result_, KEY: record}):
            pass
        self.config_ = config
        self._fitted = _Fitted(made)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the two classes, (rows, 2), in the order of `classes_`.

        An id that training did not have scores as an unknown one, a missing cell as a missing one.

        Raises:
            NotFittedError: before `fit`.
            ValueError: other columns than those of `fit`, or a damaged cell.
        """
        check_is_fitted(self)
        frame, _ = self._frame(X, reset=False)
        found = self._fitted.predictor.predict(frame)[0].to_series().to_numpy()
        return np.stack([1 - found, found], axis=1)

    def predict(self, X: Any) -> np.ndarray:
        """The more probable class of each row, (rows,); arguments and errors as of `predict_proba`."""
        second = self.predict_proba(X)[:, 1] > 0.5
        return np.asarray(self.classes_[second.astype(np.intp)])

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a model folder, without any pickle: `load` makes the estimator of it, `ctrlib predict` scores with it.

        Raises:
            NotFittedError: before `fit`.
            ValueError: a parameter or a class is nothing that JSON holds, such as a generator of random numbers.
            TargetError: there is something already.
            OSError: the disk is full.
        """
        check_is_fitted(self)
        said = {
            "parameters": {name: _plain(value) for name, value in self.get_params(deep=False).items()},
            "classes": {"dtype": self.classes_.dtype.str, "values": [_plain(one) for one in self.classes_.tolist()]},
            "num_features": self.n_features_in_,
            "feature_names": self.feature_names_in_.tolist() if hasattr(self, "feature_names_in_") else None,
            "config": self.config_,
            "result": self.result_,
        }
        try:
            content = json.dumps(said, indent=1)
        except TypeError as error:
            raise ArgumentError(
                f"a parameter or a class is not plain data ({error}), which is all that is saved: give a whole number "
                "as random_state, and classes that are numbers, texts or booleans"
            ) from error
        with (
            target(folder, "model", inputs=[self._fitted.folder], overwrite=overwrite),
            new_folder(folder) as making,
        ):
            shutil.copytree(self._fitted.folder, making, dirs_exist_ok=True)
            (making / SAID).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> CTRClassifier:
        """The estimator that `save` wrote; it gives the same probabilities, bit for bit, and needs the folder no more.

        Raises:
            SchemaError: the folder is none that `save` wrote, or a file is damaged; the message names it.
        """
        check_path("a folder that CTRClassifier.save wrote", folder=folder)
        path = Path(folder) / SAID
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            made = cls(**said["parameters"])
            made.classes_ = np.array(said["classes"]["values"], dtype=np.dtype(said["classes"]["dtype"]))
            made.n_features_in_, names = said["num_features"], said["feature_names"]
            made.config_, made.result_ = said["config"], said["result"]
        except FileNotFoundError as error:
            raise SchemaError(
                f"{folder} has no {SAID}, so CTRClassifier.save did not write it; ctr.Predictor.load reads any model "
                "folder"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise SchemaError(f"{path} is damaged ({error}): copy the folder again, or fit and save again") from error
        if names is not None:
            made.feature_names_in_ = np.array(names, dtype=object)
        made._fitted = _Fitted(Path(folder))
        made.schema_ = made._fitted.predictor.schema
        return made

    def _frame(self, X: Any, *, reset: bool) -> tuple[pl.DataFrame, bool]:
        """The rows as a polars frame, and whether they were an array, whose columns get names: x0, x1 and so on."""
        if _is_frame(X):
            validate_data(self, X, reset=reset, skip_check_array=True)
            if len(X) == 0:
                raise ArgumentError(f"Found array with 0 sample(s) (shape={X.shape}) while a minimum of 1 is required.")
            return as_frame(X, "X"), False
        try:
            array = validate_data(self, X, reset=reset, dtype="numeric", ensure_all_finite="allow-nan")
        except ValueError as error:
            if "could not convert string" not in str(error):
                raise
            raise ArgumentError(
                f"{error}: an array, or a frame whose columns have no names, holds numbers only; ids as text need a "
                "frame whose columns have names"
            ) from error
        names = getattr(self, "feature_names_in_", None)
        names = [f"x{place}" for place in range(array.shape[1])] if names is None else list(names)
        return pl.DataFrame({name: np.ascontiguousarray(column) for name, column in zip(names, array.T)}), True

    def _features(self, columns: list[str], is_array: bool) -> list[Feature]:
        """What was said of columns, in their order; all columns of an array are something."""
        kinds: dict[str, Feature] = {}
        for kind, names in (("numeric", self.numeric), ("categorical", self.categorical), ("sequence", self.sequence)):
            if isinstance(names, str):
                raise ArgumentError(f"{kind}={names!r}: expected a list of names of columns, such as [{names!r}]")
            for said in names:
                check_type("the name of a column", str, **{kind: said})
                name, transform = said, "standard"
                if kind == "numeric" and said not in columns:
                    name, _, transform = said.partition(":")
                if name not in columns:
                    raise ArgumentError(f"{kind} names {name!r}, which is no column of X: {instead([name], columns)}")
                if name in kinds:
                    raise ArgumentError(f"{kind} names {name!r}, of which something else is said, too: say it once")
                kinds[name] = (
                    Numeric(name, transform=transform or "standard")  # type: ignore[arg-type]
                    if kind == "numeric"
                    else Categorical(name)
                    if kind == "categorical"
                    else History(name)
                )
        if is_array:
            kinds |= {name: Numeric(name) for name in columns if name not in kinds}
        return [kinds[name] for name in columns if name in kinds]

    def _seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            check_whole(0, random_state=self.random_state)
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31))

    def _held_out(self, places: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Which rows are validation: of each class its share, to the row, and one at least."""
        held_out = np.zeros(len(places), dtype=bool)
        counts = np.bincount(places, minlength=len(self.classes_))
        for place, value in enumerate(self.classes_.tolist()):
            if len(self.classes_) < 2 or counts[place] < 2:
                raise ArgumentError(
                    f"class {value!r} has {counts[place]} of n_samples={len(places)} rows (with weight), and there are "
                    f"{len(self.classes_)} classes: expected two classes of two rows or more, one to train on and one "
                    "to choose the epoch by"
                )
            rows = np.flatnonzero(places == place)
            number = min(max(1, round(self.validation_fraction * len(rows))), len(rows) - 1)
            held_out[generator.permutation(rows)[:number]] = True
        return held_out


class _Fitted:
    """A copy of a model folder in a temporary one, for as long as this is needed, and its predictor.

    Pickled, it is the bytes of the files.
    """

    def __init__(self, folder: Path) -> None:
        for path in _files(folder):
            inside(folder, path.relative_to(folder).as_posix())  # of which a copy is made
        self.folder = Path(tempfile.mkdtemp(prefix="ctrlib-"))
        weakref.finalize(self, _remove, self.folder, os.getpid())
        shutil.copytree(folder, self.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SAID, ".*"))
        try:
            self.predictor = Predictor.load(self.folder)
        except SchemaError as error:  # of the folder that was given, and not of its copy
            raise SchemaError(str(error).replace(str(self.folder), str(folder))) from error

    def __reduce__(self) -> tuple[Any, ...]:
        files = {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in _files(self.folder)}
        return _unpacked, (files,)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _unpacked(files: dict[str, bytes]) -> _Fitted:
    with tempfile.TemporaryDirectory(prefix="ctrlib-") as temporary:
        for name, content in files.items():
            path = Path(temporary) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return _Fitted(Path(temporary))


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # a forked one ends, too, and has the same folder
        shutil.rmtree(folder, ignore_errors=True)


def _is_frame(X: Any) -> bool:
    """Whether columns have names: pandas' that are only numbered are an array's, as scikit-learn sees it, too."""
    package = type(X).__module__.partition(".")[0]
    return package in ("pandas", "polars") and any(isinstance(name, str) for name in getattr(X, "columns", ()))


def _array(values: Any) -> Any:
    """What scikit-learn knows: polars' series as arrays."""
    return values.to_numpy() if isinstance(values, pl.Series) else values


def _plain(value: Any) -> Any:
    """The same, of numpy's numbers Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _free(name: str, taken: set[str]) -> str:
    """A name that no column has."""
    while name in taken:
        name += "_"
    return name
