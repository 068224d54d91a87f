"""Several models on the same rows, over seeds: trained, chosen by validation, tested once, set side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ctrlib._lock import holding
from ctrlib._target import FINISHED, check_target
from ctrlib.distributed import world_size
from ctrlib.errors import ArgumentError, UnsupportedError, check_path, check_type, check_whole
from ctrlib.making import remove, sweep, write_text
from ctrlib.manifest import check_folder, data_hash, load_schema
from ctrlib.models.build import plain
from ctrlib.selection.significance import Difference, auc_influence, difference_of_means, log_loss_influence
from ctrlib.serving.model_folder import load_model, model_in_the_making
from ctrlib.training.config import (
    Training,
    complete,
    counted_anew,
    identity_of,
    refuse_another,
    training_of,
)
from ctrlib.training.defaults import config_for
from ctrlib.training.evaluate import Scores, known, predict
from ctrlib.training.finished import clean_up
from ctrlib.training.loop import to_json
from ctrlib.training.run import run
from ctrlib.training.splits import load_to_score

RESULT, UNFINISHED = "comparison.json", "comparing.json"
ANEW = "anew"  # folder for a comparison that takes the place of an older one when it is over
MEASURED = ("valid_auc", "valid_logloss", "test_auc", "test_logloss", "seconds")


@holding()
def compare(
    data: str | Path,
    models: Sequence[str] | Mapping[str, Mapping[str, Any]],
    out: str | Path,
    *,
    seeds: int = 3,
    seed: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train each model with several seeds, choose one by validation, and test the others against it.

    Each run goes through `ctr.run`, and is a model folder in `out`, called by name and seed. No two runs have the same
    seed: those of the first model are `seed`, `seed` + 1 and so on, those of the second follow. So runs are independent
    of each other, and two models that are the same differ by chance alone.

    Chosen is the model with the best mean of validation AUC. Each of the others is tested against it on test, for AUC
    and log-loss, with what seeds and rows leave uncertain (`ctrlib.selection.significance`); rows that share a group
    count as one draw. p-values are also given as Holm corrects them for how many there are.

    Killed and started again, it goes on with the runs that are missing, and the one that it was stopped in.

    Args:
        data: a prepared folder with train, valid and test.
        models: names of published models, whose settings are chosen by the data as `ctrlib train` does, or a dictionary
            from names to experiments as `ctr.run` takes them; their seeds are replaced.
        out: folder for the runs and comparison.json, the result.
        seeds: runs of each model, 2 or more.
        seed: the first.
        overwrite: replace an older comparison, which stays until this one is over.
        log: is called with a line for each run.

    Returns:
        Of each model under "models", in their order: its name, the mean and the standard deviation over seeds of
        valid_auc, valid_logloss, test_auc, test_logloss and seconds, its parameters and embedding_bytes, its config,
        and its runs. "chosen" is a name. Under "tests" for each other model its name, and for "auc" and "log_loss" the
        difference to the chosen one (other minus chosen), what `Difference` has, and p_holm.

    Raises:
        ValueError: an argument does not fit, or `out` holds another comparison.
        TargetError: `out` is the data, or a folder of another kind.
        LockedError: somebody else writes into `out`; the message says who.
        DataError: a split has one class only, or no row with weight.

    >>> import tempfile
    >>> import ctrlib as ctr
    >>> from ctrlib.data.synthetic import Teacher, generate
    >>> folder = Path(tempfile.mkdtemp())
    >>> rows, _ = generate(Teacher(num_rows=2000, cardinalities=(40, 20), num_numeric=0, seed=1))
    >>> _ = ctr.prepare(rows, folder / "data", labels="label", log=None)
    >>> found = compare(folder / "data", ["fm", "mlp"], folder / "runs", seeds=2)
    >>> [(one["name"], len(one["runs"])) for one in found["models"]], 0 <= found["tests"][0]["auc"]["p_value"] <= 1
    ([('fm', 2), ('mlp', 2)], True)
    """
    check_path("a prepared folder", data=data)
    check_path("a folder", out=out)
    check_whole(2, seeds=seeds)
    check_whole(0, seed=seed)
    if world_size() > 1:
        raise UnsupportedError("a comparison trains one run after the other in one process: start it without torchrun")
    check_target(out, "comparison", inputs=[data], overwrite=overwrite)
    data, out = Path(data), Path(out)
    check_folder(data)
    said = {"models": _configs(data, models), "seeds": seeds, "seed": seed}
    said = plain({**said, "data": load_schema(data).hash, "rows": data_hash(data)})
    if not (out / RESULT).is_file():
        return _compare(data, said, out, log)
    if (out / UNFINISHED).is_file():  # it was over but for this
        refuse_another(_read(out / UNFINISHED), said, f"{out} holds a comparison that is over, and that is another one")
        remove(out / UNFINISHED)
        return _read(out / RESULT)
    anew = out / ANEW
    if (anew / RESULT).is_file():  # it was over, and killed as it took its place
        refuse_another(_said_by(_read(anew / RESULT)), said, f"{anew} holds a comparison, and that is another one")
    else:
        _compare(data, said, anew, log)
    return _replace(out, anew)


def _compare(data: Path, said: dict[str, Any], out: Path, log: Callable[[str], None] | None) -> dict[str, Any]:
    """What `compare` says, in a folder that holds no older one."""
    configs, seeds, seed, hashes = said["models"], said["seeds"], said["seed"], (said["data"], said["rows"])
    out.mkdir(parents=True, exist_ok=True)
    if (out / UNFINISHED).is_file():
        refuse_another(_read(out / UNFINISHED), said, f"{out} holds an unfinished comparison, and that is another one")
    write_text(out / UNFINISHED, json.dumps(said, indent=1) + "\n")
    lines: list[dict[str, Any]] = []
    for place, (name, config) in enumerate(configs.items()):
        runs = []
        for number in range(seed + place * seeds, seed + (place + 1) * seeds):
            folder = out / f"{name}-{number}"
            result = _run({**config, "training": {**config["training"], "seed": number}}, data, folder, hashes)
            runs.append({"folder": folder.name, **result})
            if log is not None:
                log(
                    f"{name}, seed {number} ({place * seeds + len(runs)} of {len(configs) * seeds}): validation AUC "
                    f"{result['valid_auc']:.5f}, epoch {result['best_epoch']}, {result['seconds']:.1f} s"
                )
        lines.append({"name": name, **_summary(runs), "config": config, "runs": runs})
    chosen = max(lines, key=lambda line: float(line["valid_auc"]))["name"]
    result = {
        "data": str(data),
        "data_hash": hashes[0],
        "rows_hash": hashes[1],
        "seeds": seeds,
        "seed": seed,
        "chosen": chosen,
        "models": lines,
        "tests": _tests(data, out, lines, chosen),
    }
    write_text(out / RESULT, to_json(result, indent=1) + "\n")
    remove(out / UNFINISHED)
    return result


def _configs(data: Path, models: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> the experiment with every default filled in, without a seed of its own."""
    check_type(
        "a list of names of models, or a dictionary from names to experiments", (Sequence, Mapping), models=models
    )
    if isinstance(models, str):
        raise ArgumentError(f"models={models!r}: expected a list of names, such as [{models!r}, 'dcnv2']")
    if isinstance(models, Mapping):
        said: dict[str, Mapping[str, Any]] = dict(models)
    else:
        if len(set(models)) < len(models):
            raise ArgumentError(
                f"models={list(models)}: a model is named twice; give a dictionary from names to experiments to "
                "compare it with itself"
            )
        said = {name: config_for(data, name) for name in models}
    if len(said) < 2:
        raise ArgumentError(f"models={list(said)}: expected two or more to compare")
    made = {}
    for name, config in said.items():
        check_type("the name of a model", str, models=name)
        if not name or "/" in name or name.startswith("."):
            raise ArgumentError(f"models names {name!r}, of which a folder is made: expected a name such as dcnv2_wide")
        made[name] = counted_anew(complete(config))
        made[name]["training"]["seed"] = 0
        training_of(made[name])
    return made


def _run(config: dict[str, Any], data: Path, folder: Path, hashes: tuple[str, str]) -> dict[str, Any]:
    """The result of a run, which is done if it was not, or only in part."""
    path = folder / "metrics.json"
    if path.is_file() and (folder / "model.json").is_file():
        saved = {"training": {}, **_read(folder / "model.json")}
        refuse_another(
            identity_of(counted_anew(complete(saved)), *hashes),
            identity_of(config, *hashes),
            f"{folder} holds a run, and that is another one",
        )
        if (folder / FINISHED).is_file():
            clean_up(folder)
        sweep(folder, FINISHED)
        remove(folder / "checkpoints")  # if it was stopped between these
        return _read(path)
    _, result = run(
        data,
        config,
        out=folder,
        saving=lambda model: model_in_the_making(model, config, data, folder),
        console=Console(quiet=True),
    )
    return dict(json.loads(to_json(result)))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{path} is damaged ({error}): delete {path.parent} to do that part again") from error


def _said_by(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison was asked for."""
    models = {line["name"]: line["config"] for line in result["models"]}
    hashes = {"data": result["data_hash"], "rows": result["rows_hash"]}
    return {"models": models, **{name: result[name] for name in ("seeds", "seed")}, **hashes}


def _replace(out: Path, anew: Path) -> dict[str, Any]:
    """Put a comparison in the place of the older one around it; the result last, so that it can be done again."""
    result = _read(anew / RESULT)
    old, new = (
        [Path(one["folder"]).name for line in said["models"] for one in line["runs"]]
        for said in (_read(out / RESULT), result)
    )
    for name in old:
        if name not in new:
            remove(out / name)
    for name in new:
        if (anew / name).is_dir():  # or it was moved already
            remove(out / name)
            (anew / name).rename(out / name)
    (anew / RESULT).replace(out / RESULT)
    remove(anew)
    sweep(out, RESULT)
    return result


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in MEASURED:
        values = np.array([np.nan if one[name] is None else one[name] for one in runs], dtype=np.float64)
        found |= {name: float(values.mean()), f"{name}_sd": float(values.std(ddof=1))}
    return {**found, **{name: runs[0][name] for name in ("parameters", "network_parameters", "embedding_bytes")}}


def _tests(data: Path, out: Path, lines: list[dict[str, Any]], chosen: str) -> list[dict[str, Any]]:
    """Each of the other models against the chosen one, on test."""
    runs = {line["name"]: [out / one["folder"] for one in line["runs"]] for line in lines}
    places = {
        name: number * len(folders) + np.arange(len(folders)) for number, (name, folders) in enumerate(runs.items())
    }
    scored = [_scored(data, folder) for folders in runs.values() for folder in folders]
    found: list[dict[str, Any]] = [{"name": name, "chosen": chosen} for name in runs if name != chosen]
    for measure, influence in (("auc", auc_influence), ("log_loss", log_loss_influence)):
        pairs = [value_of(scores, influence) for scores in scored]
        values, influences = np.array([value for value, _ in pairs]), np.stack([rows for _, rows in pairs])
        covariance = influences @ influences.T
        tests = []
        for one in found:
            first, second = places[one["name"]], places[chosen]
            both = np.concatenate([first, second])
            tests.append(difference_of_means(values[first], values[second], covariance[np.ix_(both, both)]))
        for one, test, corrected in zip(found, tests, holm([test.p_value for test in tests]), strict=True):
            one[measure] = {**_finite(test), "p_holm": corrected}
    return found


def _finite(test: Difference) -> dict[str, Any]:
    said = asdict(test)
    return {**said, "degrees": None if np.isinf(test.degrees) else test.degrees}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values as Holm's procedure corrects them, so that the chance of any false one among them is what it says.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected


def _scored(data: Path, folder: Path) -> Scores:
    model, schema = load_model(folder)
    return predict(model, load_to_score(data, "test", Training(), schema))


def value_of(scores: Scores, influence: Callable[..., tuple[float, np.ndarray]]) -> tuple[float, np.ndarray]:
    """The mean over labels, and what each row, or each group of rows, adds to its error."""
    total, rows = 0.0, np.zeros(len(scores.labels))
    tasks = scores.labels.shape[1]
    for task in range(tasks):
        labels, logits, _, weights = known(scores, task)
        value, of_rows = influence(labels, logits, weights)
        total += value / tasks
        rows[~np.isnan(scores.labels[:, task]) & (scores.weights > 0)] += of_rows / tasks
    if scores.groups is None:
        return total, rows
    _, places = np.unique(scores.groups, return_inverse=True)
    sums = np.bincount(places, rows)
    return total, sums * np.sqrt(len(sums) / max(len(sums) - 1, 1))
