"""The command line: what help names, how wrong names are answered, what is imported before an answer, the tables."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli, doctor
from ctrlib.cli import tables, usage
from ctrlib.cli.compress import print_labels, print_tried
from ctrlib.cli.flags import ModelFlags, TrainingFlags, parse_option
from ctrlib.cli.models import describe, venue_of
from ctrlib.data.prepare import prepare
from ctrlib.data.scan import OnBadRow
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.manifest import write_manifest
from ctrlib.models import MODELS, build
from ctrlib.models.costs import Costs, costs, usual_schema
from ctrlib.models.table import KINDS
from ctrlib.schema import NumericFields, NumericTransform, SequenceFields
from ctrlib.search.methods import SEARCHES
from ctrlib.sharding.plan import Sharding
from ctrlib.training.config import Device, EngineName, Precision

CLASSES = {name: cli.command_class(name) for name in cli.COMMANDS}
HEAVY = ["torch", "torchrec", "fbgemm_gpu", "polars", "pandas", "pyarrow", "numpy", "rich", "typeguard"]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def choices(command: str, flag: str) -> tuple[str, ...]:
    (found,) = (one for one in usage.flags_of(CLASSES[command]) if one.name == flag)
    kind = found.kind if get_origin(found.kind) is Literal else get_args(found.kind)[0]  # or Optional
    assert get_origin(kind) is Literal
    return get_args(kind)


# Help.


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_flag_and_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == cli.main([name, "rubbish", "-h"]) == 0
    printed, said = capsys.readouterr()
    assert said == ""
    first, second = printed[: len(printed) // 2], printed[len(printed) // 2 :]
    assert first == second
    assert first.startswith(f"usage: ctrlib {name} ")
    assert max(map(len, first.splitlines())) <= 80
    for flag in usage.flags_of(CLASSES[name]):
        shown = f"[{flag.name}]" if flag.positional and not flag.required else flag.name
        assert re.search(rf"^│ {re.escape(shown)} ", first, re.MULTILINE), flag.name
        assert (flag.name in first.splitlines()[0]) == (flag.positional or flag.required)
    assert "None" not in first  # what is not asked for is said in words


def test_flags_stand_in_groups_with_titles(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    titles = [line.split(" ─")[0].removeprefix("╭─ ") for line in printed.splitlines() if line.startswith("╭")]
    groups = ("model", "training", "engine", "crossing", "experiment", "output")
    assert titles == ["positional arguments", "options", *(f"{group} options" for group in groups)]


def test_overview_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main(["-h"]) == 0
    printed, said = capsys.readouterr()
    lines = printed[: len(printed) // 2].splitlines()
    assert said == ""
    assert max(map(len, lines)) <= 80
    start = lines.index("commands:") + 1
    assert [line.split()[0] for line in lines[start : lines.index("", start)]] == list(cli.COMMANDS)
    for line, command in zip(lines[start:], CLASSES.values()):
        sentence = line.split(maxsplit=1)[1]
        assert sentence.endswith(".")
        assert command.__doc__.startswith(sentence)
    assert cli.main([]) == 2
    assert capsys.readouterr() == ("", "\n".join(lines) + "\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    versions = doctor.installed_versions()
    assert printed.startswith(f"ctrlib {ctr.__version__} (torch {versions['torch']}, torchrec {versions['torchrec']}, ")
    assert "fbgemm-gpu" in printed


def test_completion_knows_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--tyro-print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in (*cli.COMMANDS, "--cross-layers", "--setting"))


# What may be said: one list of each thing.


def test_choices_are_those_of_the_library() -> None:
    for command in ("train", "search"):
        assert choices(command, "--model") == tuple(MODELS)
        assert choices(command, "--numeric") == get_args(NumericFields)
        assert choices(command, "--sequence") == get_args(SequenceFields)
    assert choices("models", "NAME") == tuple(MODELS)
    assert choices("search", "METHOD") == tuple(SEARCHES)
    assert choices("train", "--engine") == get_args(EngineName)
    assert choices("train", "--device") == get_args(Device)
    assert choices("train", "--precision") == get_args(Precision)
    assert choices("train", "--sharding") == ("auto", *get_args(Sharding))
    for command in ("prepare", "evaluate", "predict"):
        assert choices(command, "--on-bad-row") == get_args(OnBadRow)
    ways, nothing = get_args(eval(inspect.signature(prepare).parameters["missing_labels"].annotation))
    assert choices("prepare", "--missing-labels") == get_args(ways)
    assert nothing is type(None)


def test_help_says_what_may_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["search", "--help"])
    searches = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert all(f"{name}: {search.chooses}" in searches for name, search in SEARCHES.items())
    cli.main(["prepare", "--help"])
    transforms = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert f"one of {', '.join(get_args(NumericTransform))}." in transforms


def test_search_takes_the_flags_of_model_and_training_that_train_takes() -> None:
    ours, theirs = (set(usage.flags_of(CLASSES[name])) for name in ("train", "search"))
    for group in (ModelFlags, TrainingFlags):
        assert set(usage.flags_of(group)) <= ours & theirs
    names = {flag.name for flag in usage.flags_of(ModelFlags)}
    assert names == {
        *("--model", "--dim", "--hidden", "--cross-layers", "--dropout", "--batch-norm", "--numeric", "--bins"),
        *("--sequence", "--option"),
    }
    flags = "--model gdcn --dim 8 --hidden 16 8 --cross-layers 2 --numeric periodic --sequence din --option sigma=0.1"
    train = usage.parse(CLASSES["train"], "ctrlib train", ["d", *flags.split()])
    search = usage.parse(CLASSES["search"], "ctrlib search", ["optfs", "d", "--out", "o", *flags.split()])
    assert train.model == search.model
    assert search.model.config() == {
        **{"model": "gdcn", "embedding_dim": 8, "hidden": (16, 8), "num_cross_layers": 2},
        **{"numeric": "periodic", "sequence": "din", "sigma": 0.1},
    }
    assert usage.parse(CLASSES["search"], "ctrlib search", ["optfs", "d", "--out", "o"]).model.model == "deepfm"


# From flags to a model.


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_left_to_the_model(name: str) -> None:
    assert ModelFlags(name).config() == {"model": name, "sequence": "pooled"}


def test_bins_are_quantiles_of_the_training_rows(data: Path) -> None:
    config = ModelFlags("mlp", numeric="bucketised", bins=4).fitted(data)
    assert config["edges"] == ctr.quantile_edges(data, 4)
    assert len(ModelFlags("mlp", numeric="piecewise_linear").fitted(data)["edges"][0]) > 5
    assert "edges" not in ModelFlags("mlp").fitted(data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"model": "mmoe", "hidden": (64, 32)},
            "--hidden: mmoe has no hidden; the closest are tower_hidden, expert_hidden, refine; expected some of "
            "embedding_dim, num_experts, one_gate, refine, expert_hidden, tower_hidden, dropout: say --option "
            "tower_hidden=[64,32]",
        ),
        (
            {"model": "fm", "dropout": 0.1},
            "--dropout: fm has no dropout; the closest are embedding_dim; expected some of embedding_dim: leave it "
            "out, or choose another --model",
        ),
        ({"bins": 7, "numeric": "vector"}, "--bins 7: there are no bins in --numeric vector"),
        ({"dim": 8, "option": ("embedding_dim=4",)}, "--option embedding_dim: that is said already, by a flag or"),
        ({"option": ('model="mlp"',)}, "--option model: that is said already, by a flag or for the engine, as 'dcnv2'"),
        ({"option": ("edges=[]",), "numeric": "bucketised"}, "engine, as 'quantiles of the training rows'"),
        ({"option": ("hidden=400,400",)}, "--option hidden=400,400: expected NAME=VALUE with a JSON value"),
    ],
)
def test_flags_that_would_be_idle_or_overridden_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelFlags(**flags).config()
    assert message in str(error.value)


def test_what_the_engine_sets_is_refused_as_an_option() -> None:
    flags = ModelFlags(option=("stacked=0",))
    assert flags.config()["stacked"] == 0
    with pytest.raises(ValueError, match="--option stacked: that is said already, by a flag or for the engine, as 4"):
        flags.config("fused")


def test_options_are_names_and_json() -> None:
    assert parse_option("gate-hidden=[8]") == ("gate_hidden", [8])
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        parse_option("gate_hidden")


# Wrong usage, status 2.

TRAIN_FLAGS = ", ".join(flag.name for flag in usage.flags_of(CLASSES["train"]) if not flag.positional)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            "train d --modle dcnv2",
            "ctrlib train: there is no flag --modle; the closest are --model, --min-delta, --debug\n"
            "`ctrlib train --help` says more.",
        ),
        (
            "train d --model dcnv3",
            "ctrlib train: there is no --model dcnv3; the closest are dcnv2, dcn, gdcn\n"
            "`ctrlib train --help` says more.",
        ),
        (
            "trian d",
            "ctrlib: there is no command trian; the closest are train, rank, retrieve; expected some of "
            f"{', '.join(cli.COMMANDS)}\n`ctrlib --help` says more.",
        ),
        ("--verison", "ctrlib: there is no command --verison; the closest are --version, --help; "),
        (
            "search optsf d --out x",
            "ctrlib search: there is no METHOD optsf; the closest are optfs, optinter, optembed; expected some of "
            f"{', '.join(SEARCHES)}\n",
        ),
        ("models finlmlp", "ctrlib models: there is no NAME finlmlp; the closest are finalmlp, mlp, dualmlp\n"),
        ("train d --lr 1", "ctrlib train: there is no flag --lr; the closest are --learning-rate, "),
        ("train d --seed 1 --seed=2", "ctrlib train: --seed is given twice; expected it once\n"),
        (
            "prepare d --out o --label a --label b",
            "ctrlib prepare: --label is given twice; expected it once, with all its values: --label A B\n",
        ),
        (
            "prepare --label a d --out o",
            "ctrlib prepare: DATA must be given; --label takes all that follows it, so DATA goes first\n",
        ),
        ("train d --numeric vectr", "ctrlib train: there is no --numeric vectr; the closest are vector, periodic, "),
        ("train d --cross_layer 3 --seed x", "ctrlib train: there is no flag --cross_layer; the closest are --cross-"),
        ("train -m dcn d", "ctrlib train: there is no flag -m; the closest are "),
        ("train --out x", "ctrlib train: DATA must be given\n"),
        ("predict m", "ctrlib predict: DATA and --out must be given\n"),
        ("train d --dim abc", "ctrlib train: --dim abc: expected a whole number\n"),
        ("train d --dim=8.5", "ctrlib train: --dim 8.5: expected a whole number\n"),
        ("train d --hidden 8 4.5", "ctrlib train: --hidden 4.5: expected a whole number\n"),
        ("train d --l2 much", "ctrlib train: --l2 much: expected a number\n"),
        ("train d --batch-norm yes", "ctrlib train: --batch-norm yes: expected True or False\n"),
        ("train d --dim --json", "ctrlib train: --dim: expected 1 value, got 0\n"),
        ("prepare d --out x --split 8 1", "ctrlib prepare: --split: expected 3 values, got 2\n"),
        ("train d e", "ctrlib train: e is one too many; expected DATA and flags\n"),
        ("train d --json=yes", "ctrlib train: --json takes no value, got yes\n"),
        ("doctor now", "ctrlib doctor: now is one too many; expected flags only\n"),
        ("train --dim x -- d", "ctrlib train: --dim x: expected a whole number\n"),
        ("train --hidden 8 4 d --dim x", "ctrlib train: --hidden d: expected a whole number\n--dim x: "),
        ("train --hidden 8 d --dim", "ctrlib train: --hidden d: expected a whole number\n--dim: "),
    ],
)
def test_wrong_usage_is_answered_in_short(
    arguments: str, answer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9999")
    assert cli.main(arguments.split()) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith(answer), said
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(arguments.split()) == 2
    wrapped = capsys.readouterr().err
    assert wrapped.split() == said.split()
    assert max(map(len, wrapped.splitlines())) <= 80


def test_what_is_not_explained_here_tyro_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage, "_complaints", lambda *_: [])
        assert cli.main(["train", "d", "--dim", "abc"]) == 2
    assert "Error parsing --dim" in capsys.readouterr().err


def test_values_that_look_like_flags_or_fill_a_place() -> None:
    def train(arguments: str) -> Any:
        return usage.parse(CLASSES["train"], "ctrlib train", arguments.split())

    assert train("--hidden 8 4 d").data == Path("d")
    assert train("--hidden 8 4 d").model.hidden == (8, 4)
    assert train("d --l2 -1e-3").training.l2 == -1e-3
    assert train("d --out=--odd --cross_layers 2").output.out == Path("--odd")
    assert train("d --cross_layers 2").model.cross_layers == 2
    prepared = usage.parse(CLASSES["prepare"], "", ["x.csv", "--out", "o", "--missing", "None", "--label", "a", "b"])
    assert prepared.file.missing == ("None",)
    assert prepared.column.label == ("a", "b")


# Clear refusals, status 1.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prepare nowhere.csv --out x", "nowhere.csv does not exist: expected a CSV, TSV or parquet file"),
        ("prepare x.csv --out x --valid v.csv --test t.csv", "v.csv does not exist"),
        ("prepare x.csv --out x --valid v.csv", "--valid and --test go together"),
        ("prepare x.csv --out x --positive buy", "--positive buy: expected LABEL=TEXT"),
        (
            "prepare x.csv --out x --numeric price:logg",
            "--numeric price:logg: unknown transform 'logg'; the closest are log, log_squared, log_standard; expected "
            f"some of {', '.join(get_args(NumericTransform))}",
        ),
        (
            "prepare x.csv --out prepared",
            "prepared is a prepared folder already: give another --out, or --overwrite",
        ),
        (
            "prepare x.csv --out x.csv",
            "--out x.csv is x.csv, which is read: nothing is written over",
        ),
        ("prepare x.csv --out y.csv", "--out y.csv: that is a file, expected a folder"),
        ("train nowhere", "nowhere does not exist: not a prepared folder; make one with `ctrlib prepare`"),
        ("train x.csv", "x.csv is a file, not a prepared folder; make one with `ctrlib prepare x.csv --out FOLDER`"),
        ("train empty", "schema.json does not exist: not a prepared folder"),
        ("train prepared --out x.csv/deep/er", "--out x.csv/deep/er: x.csv is a file, so no folder can be made in it"),
        ("train prepared --out model", "model is a model folder already: give another --out, or --overwrite"),
        ("train prepared --warm-start empty", "empty is not a model folder, it has no model.json"),
        ("train prepared --plan plan.json", "--plan plan.json: there is no such file"),
        ("train nowhere --model fm --dropout 0.5", "--dropout: fm has no dropout"),
        ("evaluate nowhere prepared", "nowhere is not a model folder, it does not exist: `ctrlib train --out` writes"),
        ("evaluate model nowhere", "nowhere does not exist"),
        ("evaluate model empty", "not a prepared folder"),
        ("evaluate model x.csv --split test", "--split test: x.csv is a file, only prepared folders have splits"),
        ("predict model x.csv --out scores.txt", "--out must end in .csv or .parquet, got 'scores.txt'"),
        ("predict model nowhere --out scores.csv", "nowhere does not exist"),
        ("predict model x.csv --out folder.csv", "--out folder.csv: that is a folder, expected a file"),
        (
            "compress model prepared --out x",
            "as num_bytes (--bytes) or as ratio (--ratio), one of them: got neither",
        ),
        ("compress model prepared --out x --ratio 2 --bytes 1MB", "one of them"),
        ("compress model nowhere --out x --ratio 2", "not a prepared folder"),
        ("compress model prepared --out x --ratio 2 --teachers empty", "empty is not a model folder"),
        ("search optfs nowhere --out x", "not a prepared folder"),
        (
            "search optfs prepared --out model",
            "model is a model folder, and what is written is a folder of",
        ),
        ("search optfs prepared --out x --setting penalty", "--option penalty: expected NAME=VALUE"),
    ],
)
def test_refusals_are_clear(arguments: str, message: str, refusals: dict[str, tuple[int, str, list[str]]]) -> None:
    status, said, heavy = refusals[arguments]
    assert status == 1
    assert said.startswith("ctrlib: ")
    assert message in said
    assert heavy == []


@pytest.fixture(scope="module")
def refusals(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, list[str]]]:
    """Arguments -> status, message, and the heavy modules that were imported by then, all of one new interpreter."""
    folder = tmp_path_factory.mktemp("refusals")
    for name in ("x.csv", "y.csv"):
        (folder / name).write_text("label\n1\n")
    for name in ("empty", "model", "prepared", "folder.csv"):
        (folder / name).mkdir()
    (folder / "model" / "model.json").write_text("{}")
    ctr.Schema((ctr.Categorical("item", num_embeddings=9),), ("click",)).save(folder / "prepared" / "schema.json")
    write_manifest(folder / "prepared")
    marks = [*test_refusals_are_clear.pytestmark, *test_wrong_usage_is_answered_in_short.pytestmark]  # type: ignore[attr-defined]
    cases = [arguments for mark in marks for arguments, *_ in mark.args[1]]
    code = """
import contextlib, io, json, sys
import ctrlib, ctrlib.schema
from ctrlib import cli

def answer(arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = cli.main(arguments.split())
    return status, said.getvalue(), [name for name in HEAVY if name in sys.modules]

json.dump({arguments: answer(arguments) for arguments in CASES}, sys.stdout)
"""
    code = code.replace("HEAVY", repr(HEAVY)).replace("CASES", repr(["--version", "--help", "train -h", *cases]))
    code = code.replace("sys.stdout)", "open('answers.json', 'w'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())  # type: ignore[no-any-return]


def test_nothing_heavy_is_imported_to_answer(refusals: dict[str, tuple[int, str, list[str]]]) -> None:
    assert refusals["--help"][0] == refusals["--version"][0] == refusals["train -h"][0] == 0
    assert {arguments: heavy for arguments, (_, _, heavy) in refusals.items() if heavy} == {}
    assert sum(status == 2 for status, _, _ in refusals.values()) > 15


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "ctrlib", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == b""
    assert command.wait() == 1
    command.stderr.close()


# Tables.


def test_models_are_listed_from_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for kind in KINDS:
        assert f"({kind})" in printed
    lines = iter(printed.splitlines())
    words = " ".join(printed.split())
    for name, model in MODELS.items():  # in the table's order, each on a line of its own
        assert (
            next(line for line in lines if line.split()[:1] == [name]).split(maxsplit=1)[1].startswith(venue_of(model))
        )
        assert model.summary.split()[0] in words
    assert cli.main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == list(MODELS)
    assert listed[list(MODELS).index("din")] == {
        **{"name": "din", "kind": "sequence", "title": "DIN", "paper": "Zhou et al., KDD 2018"},
        **{"url": "https://arxiv.org/abs/1706.06978", "arguments": ["softmax", "hidden", "batch_norm", "dropout"]},
        "summary": MODELS["din"].summary,
    }


def test_a_model_is_described_with_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "dcnv2"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert f"DCN V2: {MODELS['dcnv2'].summary}.\nWang et al., WWW 2021, https://arxiv.org" in printed
    assert "  num_cross_layers  3  --cross-layers\n" in printed
    assert "  hidden            [400, 400, 400]  --hidden\n" in printed
    assert '  numeric        "vector"  --numeric\n' in printed
    assert "for 10 categorical fields of width 16, 1 label:" in printed
    rows = {words[0]: words[1:] for words in map(str.split, printed.splitlines()) if words}
    assert rows["dcnv2"] == ["463,041", "461,360"]
    assert rows["mlp"] == ["385,601", "384,400"]
    assert cli.main(["models", "dtrn", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described == json.loads(json.dumps(describe(MODELS["dtrn"])))
    assert described["costs_for"] == "10 categorical fields of width 16, a history of 20 events, 2 labels"
    assert described["arguments"] == json.loads(json.dumps(MODELS["dtrn"].defaults()))
    assert described["details"] == MODELS["dtrn"].details != ""
    assert {*described["inputs"]} == {*inspect.signature(ctr.Inputs).parameters} - {"schema"}
    assert described["costs"]["dtrn"]["multiply_adds"] > described["costs"]["mlp"]["multiply_adds"]


@pytest.mark.parametrize("name", MODELS)
def test_costs(name: str) -> None:
    """Weights as the model counts them, and multiply-adds as the equations have them."""
    d, hidden = 160, 400  # 10 fields of 16
    mlp = d * hidden + 2 * hidden * hidden
    expected = {
        "fm": 0,
        "mlp": mlp + hidden,
        "dcnv2": mlp + 3 * d * d + hidden + d,
        "dualmlp": 2 * (mlp + hidden),
        "shared_bottom": d * 128 + 128 * 64 + 2 * (64 * 32 + 32),
    }
    found = costs(name)
    model = build({"model": name}, usual_schema(name))
    assert found.network_parameters == model.num_parameters()["network"]
    assert found == Costs(found.network_parameters, expected.get(name, found.multiply_adds))
    assert found.multiply_adds > 0 or name == "fm"


def test_costs_of_histories_grow_with_them() -> None:
    item = ctr.Categorical("item", num_embeddings=9)

    def of(length: int) -> int:
        history = ctr.Sequence("clicks", vocabulary="item", max_length=length, num_embeddings=9)
        return costs("din", schema=ctr.Schema((item, history), ("y",)), embedding_dim=8).multiply_adds

    # Of each event the MLP (4 * 8, 64, 1) sees the event and its product with the target: half of the first layer.
    per_event = 2 * 8 * 64 + 64
    assert [of(20) - of(10), of(30) - of(20)] == [10 * per_event, 10 * per_event]


def test_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {
        "auc": 0.71234,
        "auc_se": 0.01234,
        "gauc": 0.6,
        "gauc_groups": 1_234_567.0,
        "rows": 1e7,
        "positives": 3e6,
    }
    numbers |= {"log_loss": 0.5, "normalized_entropy": 0.9, "calibration": 1.0, "calibration_se": 0.05}
    numbers |= {"ece": 0.01, "ece_by_chance": 0.009}
    tasks: list[dict[str, Any]] = [
        {"label": name, **numbers} for name in ("click", "a label whose name is long enough to be folded")
    ]
    tables.print_scores({"auc": 0.7, "log_loss": 0.45678, "rows": 12345678.0, "tasks": tasks}, "m on d")
    tried = [
        {"method": "transform_coding, low-rank layers", "embedding_bytes": size, "valid_auc": auc, "row_error": 0.25}
        for size, auc in ((1_234_567_890, 0.71), (123_456_789, 0.7))
    ]
    print_tried(tried)
    print_labels(tasks, tasks)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["AUC,", "mean", "of", "the", "labels", "0.70000"] in rows
    assert ["rows", "12,345,678"] in rows
    assert ["click", "0.71234", "0.01234", "0.60000", "1,234,567", "10,000,000", "3,000,000"] in rows
    assert ["click", "0.50000", "0.9000", "1.0000", "0.0500", "0.01000", "0.00900"] in rows
    assert ["click", "0.71234", "0.71234", "0.50000", "0.50000"] in rows
    assert any(row[-5:] == ["123,456,789", "10.0", "0.70000", "-0.01000", "2.5e-01"] for row in rows)


# Labels by their names.

LABELS = ["click", "buy"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frame, _ = generate(Teacher(num_rows=1200, cardinalities=(20, 10), num_numeric=1))
    bought = (frame["label"].to_numpy() * (np.arange(1200) % 3 > 0)).astype(np.int8)
    path = tmp_path_factory.mktemp("raw") / "rows.csv"
    frame.rename({"label": "click"}).with_columns(buy=pl.Series(bought)).write_csv(path)
    return path


@pytest.fixture(scope="module")
def data(raw: Path) -> Path:
    assert cli.main(["prepare", str(raw), "--out", str(raw.parent / "data"), "--label", *LABELS, "--json"]) == 0
    return raw.parent / "data"


def test_labels_are_named_everywhere(raw: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    def named(tasks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        assert [next(iter(task)) for task in tasks] == ["label", "label"]
        assert [task["label"] for task in tasks] == LABELS
        return {task["label"]: task for task in tasks}

    def printed(text: str) -> dict[str, list[str]]:
        """The first row of each label: that of the table of ranking."""
        rows = [words for words in map(str.split, text.splitlines()) if words and words[0] in LABELS]
        return {words[0]: words[1:] for words in reversed(rows)}

    out, small = tmp_path / "model", tmp_path / "small"
    flags = ["--model", "mlp", "--dim", 4, "--hidden", 8, "--batch-size", 256, "--epochs", 1, "--numeric", "vector"]
    result = json.loads(run("train", data, "--out", out, *flags, "--json"))
    test = named(result["test_tasks"])
    valid = named(result["valid_tasks"])
    assert result["test_auc"] == pytest.approx((test["click"]["auc"] + test["buy"]["auc"]) / 2)
    assert result["valid_auc"] == pytest.approx((valid["click"]["auc"] + valid["buy"]["auc"]) / 2)
    assert json.loads((out / "metrics.json").read_text())["test_tasks"] == result["test_tasks"]

    assert json.loads(run("evaluate", out, data, "--json"))["tasks"] == result["test_tasks"]
    rows = named(json.loads(run("evaluate", out, raw, "--json"))["tasks"])
    assert rows["click"]["positives"] > rows["buy"]["positives"] > 0
    table = printed(run("evaluate", out, raw))
    for name in LABELS:
        assert table[name][:2] == [f"{rows[name]['auc']:.5f}", f"{rows[name]['auc_se']:.5f}"]
        assert table[name][-2:] == ["1,200", f"{rows[name]['positives']:,.0f}"]

    compressed = json.loads(
        run("compress", out, data, "--out", small, "--ratio", 2, "--epochs", 0, "--batch-size", 512, "--json")
    )
    before = named(compressed["test_tasks_before"])
    after = named(compressed["test_tasks_after"])
    assert before["buy"]["auc"] == pytest.approx(test["buy"]["auc"])
    assert compressed["test_auc_after"] == pytest.approx((after["click"]["auc"] + after["buy"]["auc"]) / 2)

    searching = ["search", "optembed", data, "--out", tmp_path / "searched", *flags, "--setting", "epochs=1"]
    text = run(*searching)
    searched = json.loads((tmp_path / "searched" / "search.json").read_text())
    named(searched["valid_tasks"])
    found = named(searched["test_tasks"])
    assert {name: words[0] for name, words in printed(text).items()} == {
        name: f"{found[name]['auc']:.5f}" for name in LABELS
    }
