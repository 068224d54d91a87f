"""A model card: README.md of a model folder, for whoever gets it, and for hubs of models, which show that file.

M. Mitchell et al., "Model Cards for Model Reporting", FAT* 2019, https://arxiv.org/abs/1810.03993. Every line is a fact
that the model, the record of its run or the prepared data hold. What nobody recorded is left out, or said to be absent.
There is no time of day in it, so that two runs that end with the same bits end with the same card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ctrlib.data.event_state import FOLDER as EVENTS
from ctrlib.data.event_state import has_events
from ctrlib.data.split import SPLITS
from ctrlib.manifest import CARD, check_file
from ctrlib.model import Model
from ctrlib.models.build import BESIDE
from ctrlib.models.table import MODELS
from ctrlib.models.tree import PLACES
from ctrlib.schema import Numeric, RawId, Schema, SchemaError, kind_of
from ctrlib.serving.markdown import code, escaped, interval, number, setting, share, table, versions, words
from ctrlib.training.config import name_of
from ctrlib.training.record import KEY

REPORT = "report.json"  # what a preparation counted
RESULTS = ("metrics.json", "search.json", "compression.json")  # one of which lies beside a model of a run
MOST_COLUMNS = 200  # are listed
# Entries of `training` that say where it was computed, and not what.
WHERE = ("workers", "device", "sharding", "plan", "checkpoint_seconds")
ENGINES = {"exact": "dense Adam over all weights", "fused": "row-wise Adagrad on the tables, Adam on the network"}
METRICS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "log-loss (nats)",
    "calibration": "calibration (predicted / observed)",
}
OTHERS = {  # of a result, beside what the record has with intervals
    "valid_auc": METRICS["auc"],
    "valid_logloss": METRICS["log_loss"],
    "test_normalized_entropy": "normalised entropy (a constant has 1)",
    "test_pr_auc": "area under precision and recall",
    "test_ece": "calibration error (20 bins)",
    "test_ece_by_chance": "calibration error of perfect scores, by chance",
    "test_rows": "rows",
    "test_positives": "positives",
}


def counted(data: str | Path) -> dict[str, Any]:
    """What the preparation of a folder counted; nothing if it left no report.

    Raises:
        SchemaError: the report is damaged.
    """
    path = Path(data) / REPORT
    if not path.is_file():
        return {}
    check_file(data, REPORT)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{path} cannot be read ({error}): copy it again, or delete it") from error


def result_in(folder: Path) -> dict[str, Any] | None:
    """The result of the run that writes into a folder in the making; None if none does."""
    for name in RESULTS:
        if (folder / name).is_file():
            return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    return None


def last_event_in(folder: str | Path, schema: Schema) -> str | None:
    """The last time in the log that a folder's histories and rates are made of, as Python writes it.

    None if it keeps no log, or one without times.

    Raises:
        SchemaError: the file that says so is damaged.
    """
    if not has_events(schema):
        return None
    path = Path(folder) / EVENTS / "state.json"
    check_file(folder, f"{EVENTS}/{path.name}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if said["last"] is None:
            return None
        if said["are_dates"]:
            return repr(str(np.datetime64(int(said["last"]), "us").item()))
        return repr(int(said["last"]) if said["last"] == int(said["last"]) else float(said["last"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SchemaError(f"{path} cannot be read ({error}): copy it, or prepare the data, again") from error


def model_card(
    model: nn.Module,
    config: Mapping[str, Any],
    schema: Schema,
    *,
    data: str,
    report: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    num_bytes: int,
    last_event: str | None,
) -> str:
    """The text of README.md.

    Args:
        model: that is saved.
        config: what it was built from, as model.json holds it.
        schema: of its data.
        data: where these were, unless the record of the run says so.
        report: what `counted` gave.
        result: of the run that trained, searched or compressed it, as `ctr.run` gives it; None if that is not known.
        num_bytes: of the file of weights.
        last_event: what `last_event_in` gave.
    """
    record = dict((result or {}).get(KEY) or {})
    parts = [
        _head(config, schema),
        _loading(config, schema, last_event),
        _model(model, config, num_bytes, result or {}),
        _data(schema, report, str(record.get("data") or data), record),
        _protocol(config, record, result),
        _metrics(config, schema, record, result),
        _limits(config, schema, report, last_event),
        versions(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def exported_card(model: str | Path, about: Mapping[str, Any], *, is_code: bool) -> str:
    """README.md of an exported model: how it is loaded, how far it is from the model, and the card of that.

    Args:
        model: the model folder.
        about: what export.json holds.
        is_code: whether the file is machine instructions, which are only loaded if one trusts them.
    """
    path = Path(model) / CARD
    theirs = path.read_text(encoding="utf-8") if path.is_file() else ""
    front, _, body = (
        theirs.removeprefix("---\n").partition("\n---\n") if theirs.startswith("---\n") else ("", "", theirs)
    )
    title = next(
        (line[2:] for line in body.splitlines() if line.startswith("# ")),
        f"A model for {', '.join(map(code, about['output']['labels']))}",
    )
    _, _, rest = body.partition("\n## Model\n")
    trust = ", trust=True" if is_code else ""
    lines = [
        f'from ctrlib.export.folder import Exported\n\nexported = Exported("."{trust})',
        "row = {feature.name: None for feature in exported.reader.features}  # a cell of each; None is a missing one",
        "probabilities = exported.predict([row])",
    ]
    parity = about["parity"]
    facts = [
        ("format", code(about["format"])),
        ("file", code(about["file"])),
        ("bytes", f"{about['bytes']:,}"),
        *((f"largest difference of a logit, {rows} rows", f"{one:.1e}") for rows, one in parity["rows"].items()),
        *((f"written by {name}", code(version)) for name, version in about["made_by"].items()),
    ]
    parts = [
        f"---\n{front or 'library_name: ctrlib'}\n---\n\n# {title}, exported",
        "## How to load it\n\nIn this folder:\n\n```python\n" + "\n".join(lines) + "\n```",
        "Without ctrlib, `reader.py` encodes rows with numpy alone; its first lines say how.",
        f"## Export\n\n{table(('what', 'value'), facts)}",
        f"## Model\n{rest.rstrip()}"
        if rest
        else "The model folder had no card, so nothing is said of data and metrics.",
    ]
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------ sections


def _head(config: Mapping[str, Any], schema: Schema) -> str:
    name = name_of(config)
    published = MODELS.get(name) if isinstance(config["model"], str) else None
    about = "A model of its author's own."
    if isinstance(config["model"], Mapping):
        about = "A model that was composed by hand: model.json has its parts."
    elif published is not None and published.url:
        about = f"{published.title} ([{published.paper}]({published.url})): {published.summary}."
    labels = ", ".join(map(code, schema.labels))
    return (
        f"---\nlibrary_name: ctrlib\npipeline_tag: tabular-classification\ntags:\n- click-through-rate\n"
        f"- {json.dumps(name)}\n---\n\n# {code(name)} for {labels}\n\n{about}\n\nIt gives, for a row, the probability "
        f"of {'each of ' if len(schema.labels) > 1 else ''}{labels}."
    )


def _loading(config: Mapping[str, Any], schema: Schema, last_event: str | None) -> str:
    own = own_modules(config)
    load = f'ctr.Predictor.load("."{f", modules={own!r}" if own else ""})'
    events = dict((schema.raw_format or {}).get("events") or {})
    lines = [
        "import ctrlib as ctr\n",
        f"predictor = {load}",
        "row = dict.fromkeys(predictor.encoder.inputs)  # a cell of each column; None is a missing one",
    ]
    if last_event is not None:
        lines.append(f"row[{events['time']!r}] = {last_event}  # no event that is known is later")
    lines.append("probabilities, counts = predictor.predict(row)")
    command = "" if own else "\n\nA file of rows: `ctrlib predict . ../rows.csv --out ../scores.csv`."
    return "## How to load it\n\nIn this folder:\n\n```python\n" + "\n".join(lines) + "\n```" + command


def own_modules(config: Mapping[str, Any]) -> list[str]:
    """The modules that a config names outside of ctrlib, which `Predictor.load` must be told.

    >>> own_modules({"model": "shop.crossed"}), own_modules({"model": {"class": "ctrlib.Model"}})
    (['shop'], [])
    """

    def paths(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            if isinstance(value.get("class"), str):
                yield value["class"]
            for inner in value.values():
                yield from paths(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from paths(inner)

    model = config["model"]
    named = [model] if isinstance(model, str) and model not in MODELS else list(paths(model))
    return sorted({path.rpartition(".")[0] for path in named} - {*PLACES, ""})


def _model(model: nn.Module, config: Mapping[str, Any], num_bytes: int, result: Mapping[str, Any]) -> str:
    facts: list[tuple[str, str]] = []
    if isinstance(model, Model):
        parameters = model.num_parameters()
        facts.append(("parameters", f"{sum(parameters.values()):,}, of the network {parameters['network']:,}"))
        if "embedding_bytes_before" not in result:  # which counts what is no weight, too
            facts.append(("embedding bytes", f"{model.embedding_bytes():,}"))
    facts.append(("bytes of model.safetensors", f"{num_bytes:,}"))
    if "method" in result:
        facts.append(("made smaller by", code(result["method"])))
    for name, what in (("embedding_bytes", "embedding bytes"), ("test_auc", "test AUC"), ("valid_auc", "valid AUC")):
        if f"{name}_before" in result:
            before, after = result[f"{name}_before"], result.get(f"{name}_after", result.get(name))
            facts.append((f"{what}, before and after", f"{number(before)}, {number(after)}"))
    if replaced := config.get("replaced"):
        facts.append(("parts replaced", ", ".join(code(path) for path in replaced)))
    model_said = config["model"] if isinstance(config["model"], str) else name_of(config)
    settings = {"model": model_said, **{name: one for name, one in config.items() if name not in ("model", *BESIDE)}}
    settings |= {name: config[name] for name in ("crosses",) if config.get(name)}
    said = table(("setting", "value"), ((code(name), setting(value)) for name, value in settings.items()))
    return f"## Model\n\n{table(('what', 'value'), facts)}\n\n{said}\n\nThe whole config is in model.json."


def _data(schema: Schema, report: Mapping[str, Any], data: str, record: Mapping[str, Any]) -> str:
    facts = [("data", code(data)), ("hash of the schema", code(schema.hash))]
    if record.get("rows_hash"):
        facts.append(("hash of the rows", code(record["rows_hash"])))
    for what, name in (("group", schema.group), ("weight", schema.weight)):
        if name:
            facts.append((what, code(name)))
    if report.get("note"):
        facts.append(("note", escaped(report["note"])))
    parts = [table(("what", "value"), facts)]
    rows, rates, missing = (dict(report.get(name) or {}) for name in ("rows", "label_mean", "missing_labels"))
    if rows:
        heads = ["split", "rows", *(f"rate of {code(label)}" for label in schema.labels)]
        lines = []
        for split in (name for name in SPLITS if name in rows):
            cells = [split, f"{rows[split]:,}"]
            for label in schema.labels:
                without = (missing.get(split) or {}).get(label)
                cells.append(
                    number((rates.get(split) or {}).get(label)) + (f" ({without:,} missing)" if without else "")
                )
            lines.append(cells)
        parts.append(table(heads, lines))
    else:
        parts.append("The prepared folder has no report.json, so rows and rates of its splits are not told here.")
    of_columns = dict(report.get("features") or {})
    lines = [_column(feature, dict(of_columns.get(feature.name) or {})) for feature in schema.features[:MOST_COLUMNS]]
    parts.append(
        table(("column", "kind", "rows of its table, or transform", "missing in train", "unseen in test"), lines)
    )
    if (more := len(schema.features) - MOST_COLUMNS) > 0:
        parts.append(f"And {more:,} more: schema.json has them all.")
    if left_out := dict(report.get("left_out") or {}):
        names = ", ".join(map(code, list(left_out)[:MOST_COLUMNS]))
        parts.append(f"Columns of the data that it does not read: {names}.")
    return "## Data\n\n" + "\n\n".join(parts)


def _column(feature: Any, counts: Mapping[str, Any]) -> list[str]:
    if isinstance(feature, Numeric):
        return [code(feature.name), "numeric", feature.transform, "", ""]
    size = str(feature.form) if isinstance(feature, RawId) else f"{feature.num_embeddings or 0:,}"
    shares = [(counts.get(what) or {}).get(split) for what, split in (("missing", "train"), ("oov", "test"))]
    unseen = "" if isinstance(feature, RawId) else share(shares[1])
    return [code(feature.name), kind_of(feature), size, share(shares[0]), unseen]


def _protocol(config: Mapping[str, Any], record: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    lines = []
    if result is None:
        lines.append("No result of a run was given when this folder was written: there is nothing to say of metrics.")
    chosen = {name: (result or {}).get(name) for name in ("best_epoch", "epochs")}
    if record.get("chosen_by") and chosen["best_epoch"] is not None:
        lines.append(
            f"The weights are those of epoch {chosen['best_epoch']} of {chosen['epochs']}, chosen by "
            f"{words(record['chosen_by'])}."
        )
    if "tried" in (result or {}):
        lines.append(
            "It is what fits the budget and is best by AUC on valid among all that compression.json lists, fine-tuned "
            "towards the model that it was made from, whose settings these are:"
        )
    if any(line["split"] == "test" for line in record.get("metrics", ())):
        lines.append("Test was scored once, with the weights that were chosen.")
    facts = {name: (result or {}).get(name) for name in ("engine", "precision", "processes", "seed")}
    training = {name: one for name, one in dict(config.get("training") or {}).items() if name not in WHERE}
    training = {**{name: one for name, one in facts.items() if one is not None}, **training}
    if search := config.get("search"):
        training |= {f"search.{name}": one for name, one in search.items()}
    if training:
        rows = ((code(name), setting(value)) for name, value in training.items())
        lines.append(table(("setting", "value"), rows))
    return "## Protocol\n\n" + "\n\n".join(lines) if lines else ""


def _metrics(
    config: Mapping[str, Any], schema: Schema, record: Mapping[str, Any], result: Mapping[str, Any] | None
) -> str:
    if result is None:
        return ""
    lines = []
    for one in record.get("metrics", ()):
        what = METRICS.get(one["metric"], one["metric"])
        lines.append([one["split"], code(one["label"]), what, number(one["value"]), interval(one["low"], one["high"])])
    label = code(schema.labels[0]) if len(schema.labels) == 1 else "mean of labels"
    there = {(one["split"], METRICS.get(one["metric"])) for one in record.get("metrics", ())}
    for name, what in OTHERS.items():
        split = name.partition("_")[0]
        sums = len(schema.labels) > 1 and what in ("rows", "positives")
        if name in result and not sums and (split, what) not in there:
            value = int(result[name]) if what in ("rows", "positives") else result[name]
            lines.append([split, label, what, number(value), ""])
    parts = []
    if lines:
        parts.append(table(("split", "label", "metric", "value", "95 % interval"), lines))
    if record.get("independent"):
        taken = record["independent"]
        units = "rows" if taken == "rows" else f"values of {code(taken)}"
        parts.append(f"Intervals are 1.96 standard errors to both sides, which take {units} as independent.")
    if beside := result.get("baselines"):
        heads = ("label", "model", "AUC", "log-loss", "calibration", "difference of AUC", "p")
        rows = [
            [code(one["label"]), escaped(one["name"]), *(number(one[name]) for name in ("auc", "log_loss"))]
            + [number(one.get(name)) if name in one else "" for name in ("calibration", "difference", "p_value")]
            for one in beside
        ]
        said = f"### Beside simple models\n\nOn the same {beside[0]['rows']:,} rows of test:\n\n{table(heads, rows)}"
        parts.append(said)
        if warnings := result.get("warnings"):
            parts.append("\n".join(f"- {escaped(warning)}." for warning in warnings))
    parts.append(_calibration(config.get("calibration")))
    return "## Metrics\n\n" + "\n\n".join(parts)


def _calibration(calibrator: Mapping[str, Any] | None) -> str:
    if not calibrator:
        return "No calibrator was fitted."
    pairs = ", ".join(
        f"{number(slope)} and {number(intercept)}"
        for slope, intercept in zip(calibrator["slope"], calibrator["intercept"])
    )
    return f"Slope and intercept of the logits of each label were fitted on valid: {pairs}."


def _limits(config: Mapping[str, Any], schema: Schema, report: Mapping[str, Any], last_event: str | None) -> str:
    training, rows = dict(config.get("training") or {}), dict(report.get("rows") or {})
    lines = []
    if "train" in rows:
        lines.append(f"It has learnt from {rows['train']:,} rows, those of train above.")
    if schema.vocabularies:
        lines.append(
            "An id that train did not hold, or too rarely, gets the one row that all of these share: the table of "
            "columns says how many there were in test, and `counts` how many there are in what is scored."
        )
    if schema.dense:
        lines.append("A missing number becomes the mean of train, and one beyond the range of train is not clipped.")
    if training.get("engine") in ENGINES:
        lines.append(f"The {training['engine']} engine trained it: {ENGINES[training['engine']]}.")
    if (kept := training.get("keep_negatives", 1.0)) < 1:
        lines.append(f"It was trained on {kept:g} of the rows without a click; logits are those of all rows.")
    if training.get("warm_start"):
        lines.append(f"It started from the weights of {code(training['warm_start'])}.")
    if last_event is not None:
        lines.append(
            f"Histories and rates are made of events up to {last_event}, when this was written (`ctrlib update` adds "
            "later ones): earlier rows are refused."
        )
    lines.append("Nothing was measured here of groups of rows: `ctrlib evaluate . ROWS --by COLUMN` does.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
