"""The command line: `ctrlib prepare | train | evaluate | predict | compress | search | doctor`.

For people who write no Python.

With --json the answer goes to stdout as one JSON object and nothing else does; progress always goes to stderr.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional

if TYPE_CHECKING:
    from ctrlib.model import Model
    from ctrlib.schema import Feature, Schema

# Heavy imports (torch, TorchRec) are inside the commands, so that --help and doctor answer at once and always.


from ctrlib.models.table import MODELS

ModelName = Literal[tuple(MODELS)]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Prepare:
    """Turn raw files into a prepared folder: ids, numbers, vocabularies and a schema.

    Column types are inferred and shown; name columns below to override. Everything that is fitted (vocabularies,
    scales) is fitted on the training rows only.

    Example: ctrlib prepare clicks.csv --out data/clicks --label click --group user_id --numeric price
    """

    data: Positional[Path]
    """CSV, TSV or parquet file (.gz too) of all rows, or of the training rows if --valid and --test are given."""
    out: Path
    """Prepared folder to write."""
    valid: Path | None = None
    """File with the validation rows."""
    test: Path | None = None
    """File with the test rows."""
    label: tuple[str, ...] = ("label",)
    """Column(s) that hold the 0/1 label(s)."""
    positive: tuple[str, ...] = ()
    """For labels that are text, the text of the positive class: income=>50K"""
    weight: str | None = None
    """Column that holds the sample weight."""
    group: str | None = None
    """Column to group by for GAUC, such as the user; it may be a feature too."""
    categorical: tuple[str, ...] = ()
    """Columns with one id per row."""
    numeric: tuple[str, ...] = ()
    """Columns with one number per row; a transform may follow: price:log, age:minmax (none, log, log_standard,
    log_squared, minmax, standard)."""
    multi: tuple[str, ...] = ()
    """Columns with several ids per row; the separator may follow: genres:|"""
    sequence: tuple[str, ...] = ()
    """Columns with an ordered history of ids; the column whose vocabulary they share may follow: clicked_items:item"""
    ignore: tuple[str, ...] = ()
    """Columns to leave out."""
    min_count: int = 1
    """Values rarer than this in train share the out-of-vocabulary row."""
    max_values: int | None = None
    """Keep only so many of the most frequent values per vocabulary."""
    split: tuple[float, float, float] = (8, 1, 1)
    """Parts of train, valid and test, when they come from one file."""
    split_by: str | None = None
    """Split by this column's order (time) instead of at random."""
    seed: int = 0
    """Of the random split."""
    separator: str | None = None
    """Field separator of text files; otherwise from the file's name."""
    columns: tuple[str, ...] = ()
    """Column names, for files without a header line."""
    missing: tuple[str, ...] = ("",)
    """Texts that mean a missing cell, such as NA or ?"""
    missing_labels: Literal["raise", "mask"] = "raise"
    """Rows without a label: stop, or leave that label out of the loss."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Damaged rows: stop and name the first, or leave them out and count them."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    json: bool = False
    """Print the report as JSON."""

    def features(self) -> list[Feature]:
        """The features that the flags name."""
        from ctrlib.schema import Categorical, MultiValued, Numeric, NumericTransform, Sequence

        rare: dict[str, Any] = {"min_count": self.min_count, "max_values": self.max_values}
        features: list[Feature] = [Categorical(name, **rare) for name in self.categorical]
        for text in self.numeric:
            name, _, transform = text.partition(":")
            known = get_args(NumericTransform)
            if transform and transform not in known:
                raise ValueError(f"--numeric {text}: unknown transform {transform!r}, expected one of {known}")
            features.append(Numeric(name, transform=cast(NumericTransform, transform or "standard")))
        for text in self.multi:
            name, _, separator = text.partition(":")
            features.append(MultiValued(name, separator=separator or "|", **rare))
        for text in self.sequence:
            name, _, shared = text.partition(":")
            features.append(Sequence(name, vocabulary=shared or None, **rare))
        return features

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.data.prepare import prepare

        unclear = [text for text in self.positive if "=" not in text]
        if unclear:
            raise ValueError(f"--positive {unclear[0]}: expected LABEL=TEXT, such as income=>50K")
        if (self.valid is None) != (self.test is None):
            raise ValueError("--valid and --test go together: give both, or neither to split DATA")
        data: Any = self.data
        if self.valid is not None:
            data = {"train": self.data, "valid": self.valid, "test": self.test}
        schema = prepare(
            data,
            self.out,
            features=self.features(),
            labels=self.label,
            weight=self.weight,
            group=self.group,
            min_count=self.min_count,
            max_values=self.max_values,
            split=self.split,
            split_by=self.split_by,
            seed=self.seed,
            ignore=self.ignore,
            separator=self.separator,
            columns=self.columns or None,
            missing_values=self.missing,
            missing_labels=self.missing_labels,
            label_positive=dict(text.split("=", 1) for text in self.positive),
            on_bad_row=self.on_bad_row,
            overwrite=self.overwrite,
            log=Console(stderr=True).print,
        )
        if self.json:
            report = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
            print(json.dumps({"out": str(self.out), "hash": schema.hash, **report}))
        else:
            print(f"prepared {self.out}; train with: ctrlib train {self.out}")
        return 0


@dataclass(frozen=True)
class Train:
    """Train a model on a prepared folder, choose the epoch by validation, report the test split once.

    Writes the model (weights, schema, vocabularies), metrics.json, log.jsonl and the learning curve as a picture.

    Example: ctrlib train data/clicks --model dcnv2 --dim 16 --out runs/clicks
    """

    data: Positional[Path]
    """Prepared folder."""
    out: Path | None = None
    """Folder for the model; otherwise runs/NAME-MODEL."""
    model: ModelName = "dcnv2"
    """Which published model."""
    dim: int | None = None
    """Width of the embeddings; otherwise 16 (multiples of 4 for the fused engine)."""
    hidden: tuple[int, ...] | None = None
    """Widths of the MLP's hidden layers; otherwise those of the preset, mostly 400 400 400."""
    cross_layers: int | None = None
    """Cross layers of dcn, dcnv2, dcnv2_mix and gdcn; otherwise 3."""
    dropout: float | None = None
    """Dropout of the MLP; otherwise 0."""
    batch_norm: bool | None = None
    """Batch normalisation in the MLP; otherwise as the preset has it, mostly False."""
    numeric: Literal["vector", "bucketised", "piecewise_linear", "periodic", "autodis"] = "vector"
    """How numbers become fields: vector is value times vector; the next two use quantiles of the training rows."""
    bins: int | None = None
    """Quantile bins per number, for bucketised and piecewise_linear; otherwise 32."""
    sequence: Literal["pooled", "mean", "din", "din_softmax", "bst", "sim", "tim", "tim_shared"] = "pooled"
    """How histories become fields; pooled is the mean (or sum) of each, the others compare all histories with the
    features whose vocabulary they share."""
    option: tuple[str, ...] = ()
    """Other arguments of the model, as NAME=VALUE with a JSON value: num_heads=5 hidden_1=[400,400]; a wrong name lists
    the right ones. See ctrlib.models."""
    engine: Literal["exact", "fused"] = "exact"
    """exact: dense Adam as in the papers. fused: row-wise Adagrad through TorchRec, for large tables."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of tower and head in the fused engine."""
    learning_rate: float = 1e-3
    """Adam's step."""
    l2: float = 0.0
    """L2 on whole tables and on what makes fields of numbers (exact engine)."""
    embedding_learning_rate: float = 0.02
    """Row-wise Adagrad's step (fused engine)."""
    batch_size: int | None = None
    """Rows per step; otherwise 4096, or less on small data, so that an epoch has about 100 steps."""
    epochs: int = 100
    """Upper limit; training stops when validation AUC has stopped rising."""
    patience: int = 2
    """Epochs without a better validation AUC before stopping."""
    seed: int = 0
    """Of initial weights, shuffle and dropout."""
    workers: int = 1
    """Threads that prepare batches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"
    """How the fused engine spreads tables over the processes that torchrun starts."""
    plan: Path | None = None
    """A plan.json of an earlier run, to spread tables as that did."""
    checkpoint_seconds: float = 300.0
    """The most work that a kill may cost; the same command goes on from --out/checkpoints."""
    warm_start: Path | None = None
    """A model folder to start from: its rows follow their values into the new vocabularies."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    overwrite: bool = False
    """Replace the model in --out if there is one."""
    json: bool = False
    """Print the result as JSON."""

    def config(self) -> dict[str, Any]:
        """What `models.build` needs to make this model."""
        from ctrlib.data.quantiles import quantile_edges
        from ctrlib.models import for_engine

        takes = ["embedding_dim", *MODELS[self.model].arguments]
        flags = {
            "dim": "embedding_dim",
            "hidden": "hidden",
            "cross_layers": "num_cross_layers",
            "dropout": "dropout",
            "batch_norm": "batch_norm",
        }
        # What is not asked for is the preset's to say: its defaults are the paper's.
        changed = [name for name in flags if getattr(self, name) is not None]
        idle = [name for name in changed if flags[name] not in takes]
        if idle:
            similar = [argument for argument in takes if any(argument.startswith(flags[name]) for name in idle)]
            raise ValueError(
                f"{', '.join('--' + name.replace('_', '-') for name in idle)}: {self.model} has no such argument; "
                + (f"say --option with {' or '.join(similar)}" if similar else "leave it out or choose another --model")
            )
        config: dict[str, Any] = {"model": self.model}
        config |= {flags[name]: getattr(self, name) for name in changed}
        config |= {"numeric": self.numeric, "sequence": self.sequence}
        binned = self.numeric in ("bucketised", "piecewise_linear")
        if self.bins is not None and not binned:
            raise ValueError(f"--bins {self.bins}: there are no bins in --numeric {self.numeric}")
        if binned:
            config["edges"] = quantile_edges(self.data, 32 if self.bins is None else self.bins)
        config = for_engine(config, self.engine)
        for name, value in map(parse_option, self.option):
            if name in config:
                raise ValueError(
                    f"--option {name}: that is said already, by a flag or for the engine, as {config[name]!r}"
                )
            config[name] = value
        return config

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib import models
        from ctrlib.distributed import rank
        from ctrlib.serving.predictor import save_model
        from ctrlib.serving.warm_start import warm_start
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json
        from ctrlib.training.run import run

        out = self.out or Path("runs") / f"{self.data.name}-{self.model}"
        unfinished = (out / "checkpoints").exists()  # of this very run, or `run` refuses it
        if (out / "model.json").exists() and not self.overwrite and not unfinished:
            raise ValueError(f"{out} holds a model already: give another --out, or --overwrite to replace it")
        config = self.config()
        keep_freed_memory()
        built: list[Model] = []

        def build(schema: Schema) -> Model:
            model = models.build(config, schema)
            if self.warm_start is not None and not built:  # `run` builds a second one for the trained weights
                carried = warm_start(model, self.data, self.warm_start)
                for vocabulary, rows in carried.items() if rank() == 0 else ():
                    counts = f"{rows.carried:,} values carried over, {rows.new:,} new, {rows.gone:,} gone"
                    print(f"warm start: {vocabulary}: {counts}", file=sys.stderr)
            built[:] = [model]
            return model

        _, result = run(
            self.data,
            build,
            engine=self.engine,
            batch_size=self.batch_size or sensible_batch_size(self.data),
            learning_rate=self.learning_rate,
            embedding_l2=self.l2,
            embedding_learning_rate=self.embedding_learning_rate,
            precision=self.precision,
            max_epochs=self.epochs,
            patience=self.patience,
            seed=self.seed,
            workers=self.workers,
            device=self.device,
            sharding=self.sharding,
            plan=self.plan,
            checkpoint_seconds=self.checkpoint_seconds,
            out=out,
            identity={"warm_start": str(self.warm_start)},
            tensorboard=self.tensorboard,
            on_trained=lambda model: save_model(model, config, self.data, out),
        )
        if rank() > 0:
            return 0
        if self.json:
            print(to_json({"out": str(out), **result}))
        else:
            print_scores(result, f"{self.model} on {self.data}")
            print(f"model, schema, metrics.json, log.jsonl and curve.png are in {out}/")
        return 0


def parse_option(text: str) -> tuple[str, Any]:
    """One NAME=VALUE of --option.

    Raises:
        ValueError: there is no "=", or the value is not JSON.

    >>> parse_option("hidden_1=[400, 400]")
    ('hidden_1', [400, 400])
    """
    name, _, value = text.partition("=")
    try:
        return name.strip().replace("-", "_"), json.loads(value)
    except ValueError:
        raise ValueError(
            f"--option {text}: expected NAME=VALUE with a JSON value, such as num_heads=5, zero_context=true or "
            "hidden_1=[400,400]"
        ) from None


@dataclass(frozen=True)
class Evaluate:
    """Score labelled rows with a saved model and print the metrics.

    DATA is a prepared folder (with --split) or a raw file with the label columns.

    Example: ctrlib evaluate runs/clicks data/clicks --split test
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Positional[Path]
    """Prepared folder, or raw CSV, TSV or parquet file."""
    split: str | None = None
    """Which split of a prepared folder; otherwise test."""
    batch_size: int = 8192
    """Rows per step."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Damaged rows of a raw file: stop and name the first, or leave them out and count them."""
    json: bool = False
    """Print the metrics as JSON."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.serving.predictor import Predictor
        from ctrlib.training.loop import to_json

        predictor = Predictor.load(self.model)
        if self.data.is_dir():
            name = self.split or "test"
            scores = predictor.evaluate_prepared(self.data, name, batch_size=self.batch_size)
        elif self.split is None:
            name = "rows"
            scores = predictor.evaluate(self.data, batch_size=self.batch_size, on_bad_row=self.on_bad_row)
        else:
            raise ValueError(f"--split {self.split}: {self.data} is a file, only prepared folders have splits")
        if self.json:
            print(to_json(scores))
        else:
            print_scores(scores, f"{self.model} on {self.data}, {name}")
            print_counts(scores)
        return 0


@dataclass(frozen=True)
class Predict:
    """Score raw rows with a saved model: one probability per row and label, in the order of the file.

    Unseen and missing ids score normally and are counted.

    Example: ctrlib predict runs/clicks today.csv --out scores.csv
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Positional[Path]
    """Raw CSV, TSV or parquet file; labels are not needed."""
    out: Path
    """File to write: .csv or .parquet, a column per label."""
    batch_size: int = 8192
    """Rows per step."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Damaged rows: stop and name the first, or leave them out (the file then has fewer rows) and say which."""
    json: bool = False
    """Print the counts as JSON."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.serving.predictor import Predictor

        if self.out.suffix not in (".csv", ".parquet"):
            raise ValueError(f"--out must end in .csv or .parquet, got {self.out.name!r}")
        predictor = Predictor.load(self.model)
        frame, counts = predictor.predict(self.data, batch_size=self.batch_size, on_bad_row=self.on_bad_row)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        frame.write_csv(self.out) if self.out.suffix == ".csv" else frame.write_parquet(self.out)
        if self.json:
            print(json.dumps({"out": str(self.out), **counts}))
        else:
            print(f"{counts['rows']:,} rows scored into {self.out}")
            print_counts(counts)
        return 0


@dataclass(frozen=True)
class Compress:
    """Make a trained model smaller: its embeddings in a budget of bytes, by what validation likes best.

    Tables are coded in a few bytes a row, rounded, or cut; the best that fits is fine-tuned towards the original. OUT
    receives a model folder, compression.json with all that was tried, and compression.png.

    Example: ctrlib compress runs/clicks data/clicks --ratio 20 --out runs/clicks_small
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Positional[Path]
    """The prepared folder that it was trained on."""
    out: Path
    """Where the smaller model goes."""
    bytes: str | None = None
    """The budget for tables, decoders, remaps and wide part: 5MB, 800kB, 2MiB."""
    ratio: float | None = None
    """Or how many times fewer bytes than now."""
    layer_ratio: float | None = None
    """Also give the linear layers so many times fewer weights, by low rank."""
    epochs: int = 1
    """Of fine-tuning over train; 0 for none."""
    learning_rate: float = 1e-4
    """Of fine-tuning."""
    teachers: tuple[Path, ...] = ()
    """More models of the same data, such as other seeds: fine-tuning goes towards the mean logit of all."""
    batch_size: int = 8192
    """Rows per step."""
    seed: int = 0
    """Of the order of train."""
    json: bool = False
    """Print the result as JSON."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.search.compression import compress, parse_bytes, table_of
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json

        keep_freed_memory()
        result = compress(
            self.model,
            self.data,
            self.out,
            num_bytes=None if self.bytes is None else parse_bytes(self.bytes),
            ratio=self.ratio,
            layer_ratio=self.layer_ratio,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            teachers=self.teachers,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        if self.json:
            print(to_json(result))
            return 0
        Console().print(table_of(result))
        print(
            f"{self.out}: {result['ratio']:.1f} times fewer bytes of embeddings by {result['method']}, "
            f"{result['total_ratio']:.1f} times fewer in all; test AUC "
            f"{result['test_auc_before']:.5f} before, {result['test_auc_after']:.5f} after"
        )
        return 0


@dataclass(frozen=True)
class Search:
    """Let the data choose what of a model is worth its bytes, retrain that, and report the test split once.

    optfs: which values of the features exist. optembed: which rows, and how wide. dnis: which columns, by how frequent
    a value is. optinter: how each pair of fields interacts. OUT receives a model folder, search.json and search.png,
    which explain what was chosen; the same command goes on after a kill.

    Example: ctrlib search optfs data/clicks --model deepfm --setting penalty=1e-5 --out runs/clicks_optfs
    """

    method: Positional[Literal["optfs", "optembed", "dnis", "optinter"]]
    """How to search."""
    data: Positional[Path]
    """Prepared folder."""
    out: Path
    """Where the model and the explanation go."""
    model: ModelName = "deepfm"
    """Which published model."""
    dim: int | None = None
    """Width of the embeddings; otherwise 16."""
    hidden: tuple[int, ...] | None = None
    """Widths of the MLP's hidden layers."""
    dropout: float | None = None
    """Dropout of the MLP."""
    batch_norm: bool | None = None
    """Batch normalisation in the MLP."""
    option: tuple[str, ...] = ()
    """Other arguments of the model, as for `ctrlib train`."""
    setting: tuple[str, ...] = ()
    """Settings of the method, as NAME=VALUE with a JSON value: penalty=1e-5 epochs=10; a wrong name lists them."""
    learning_rate: float = 1e-3
    """Adam's step, in the search and after it."""
    l2: float = 0.0
    """L2 on whole tables, in the search and after it."""
    batch_size: int | None = None
    """Rows per step; otherwise 4096, or less on small data."""
    epochs: int = 100
    """Of the retraining at most; it stops when validation AUC has stopped rising."""
    patience: int = 2
    """Epochs without a better validation AUC before stopping."""
    seed: int = 0
    """Of initial weights, shuffle, dropout, and the search."""
    overwrite: bool = False
    """Replace the model in --out if there is one."""
    json: bool = False
    """Print the result as JSON."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.search.run import search_and_retrain, settings_of
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json

        if (self.out / "model.json").exists() and not self.overwrite:
            raise ValueError(f"{self.out} holds a model already: give another --out, or --overwrite to replace it")
        keep_freed_memory()
        model = Train(
            self.data,
            model=self.model,
            dim=self.dim,
            hidden=self.hidden,
            dropout=self.dropout,
            batch_norm=self.batch_norm,
            option=self.option,
        )
        values = {"learning_rate": self.learning_rate, "embedding_l2": self.l2}
        result = search_and_retrain(
            self.method,
            self.data,
            model.config(),
            self.out,
            settings=settings_of(self.method, {**values, **dict(map(parse_option, self.setting))}),
            batch_size=self.batch_size or sensible_batch_size(self.data),
            learning_rate=self.learning_rate,
            embedding_l2=self.l2,
            max_epochs=self.epochs,
            patience=self.patience,
            seed=self.seed,
        )
        if self.json:
            print(to_json(result))
            return 0
        print("\n".join(result["summary"].get("words", ())))
        print_scores(result, f"{self.method}, {self.model} on {self.data}")
        print(
            f"{self.out}: {result['embedding_bytes_before']:,} bytes of embeddings before, "
            f"{result['embedding_bytes']:,} after ({result['ratio']:.1f} times fewer); see search.png"
        )
        return 0


def print_counts(counts: dict[str, Any]) -> None:
    """What was odd about raw rows; nothing for a prepared folder."""
    for name, unseen in counts.get("unseen", {}).items():
        missing = counts["missing"][name]
        if unseen or missing:
            print(f"  {name}: {unseen:,} unseen and {missing:,} missing ids")
    if counts.get("ignored"):
        print(f"  columns that the model does not know were ignored: {', '.join(counts['ignored'])}")
    for remark in counts.get("remarks", ()):
        print(f"  {remark}", file=sys.stderr)
    if rows := counts.get("skipped_rows"):
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in counts["skipped"].items())
        which = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5:,} more" if len(rows) > 5 else "")
        print(f"  {len(rows):,} bad rows were left out ({reasons}): rows {which}")


@dataclass(frozen=True)
class Doctor:
    """Check this installation and print the exact fix for what is wrong."""

    json: bool = False
    """Print the findings as JSON."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.doctor import main as doctor

        return doctor(json=self.json)


def sensible_batch_size(data: Path) -> int:
    """4096, or the power of two, not below 64, that makes about 100 steps of an epoch on smaller data."""
    from ctrlib.data.loader import Loader

    num_rows = Loader(data, "train", batch_size=1).num_rows
    steps: int = num_rows // 100
    return max(64, min(4096, 1 << max(0, steps.bit_length() - 1)))


# What a person wants to know first: name in the result, label, format.
SCORES: tuple[tuple[str, str, str], ...] = (
    ("test_auc", "test AUC", ".5f"),
    ("test_auc_se", "  standard error (DeLong)", ".5f"),
    ("test_logloss", "test log-loss (nats)", ".5f"),
    ("test_gauc", "test GAUC", ".5f"),
    ("test_calibration", "test calibration (predicted / observed)", ".4f"),
    ("valid_auc", "validation AUC", ".5f"),
    ("auc", "AUC", ".5f"),
    ("auc_se", "  standard error (DeLong)", ".5f"),
    ("log_loss", "log-loss (nats)", ".5f"),
    ("gauc", "GAUC", ".5f"),
    ("calibration", "calibration (predicted / observed)", ".4f"),
    ("rows", "rows", ",.0f"),
    ("embedding_bytes", "embedding bytes", ",.0f"),
    ("parameters", "parameters", ",.0f"),
    ("samples_per_second", "training samples/s", ",.0f"),
    ("best_epoch", "best epoch", ".0f"),
    ("seconds", "seconds in all", ".1f"),
)


def print_scores(scores: dict[str, Any], title: str) -> None:
    """One table."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, label, form in SCORES:
        if key in scores:
            table.add_row(label, format(scores[key], form))
    for task, metrics in enumerate(scores.get("test_tasks", scores.get("tasks", ()))):
        table.add_row(f"label {task + 1}: AUC, log-loss", f"{metrics['auc']:.5f}, {metrics['log_loss']:.5f}")
    Console().print(table)


Command = (
    Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `ctrlib` command; returns the exit status: 0 done, 1 a clear refusal, 2 wrong usage."""
    command = tyro.cli(
        Command,
        prog="ctrlib",
        description="Click-through-rate models from raw rows to an honest AUC.",
        args=arguments,
        config=(OmitArgPrefixes, FlagCreatePairsOff),
    )
    try:
        return command()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        from ctrlib.doctor import hint

        advice = hint(error) if isinstance(error, ImportError | OSError) else ""
        print(f"ctrlib: {error}{f'. {advice}' if advice else ''}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
