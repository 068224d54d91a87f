"""recipes/speed.py: what is counted, which way ratios point, and that the programs beside it answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_results import write_results
from torch import nn

import ctrlib as ctr
import ctrlib_speed
import programs
import results
import speed
from ctrlib.layers import Hidden

ROOT = Path(__file__).parent.parent


def test_ratios_say_how_many_times_better_ctrlib_is() -> None:
    table = speed.Table()
    for ours, theirs in ((30.0, 10.0), (10.0, 10.0), (40.0, 20.0)):  # ratios 3, 1, 2
        table.add("epoch, rows/s", "ctrlib", ours)
        table.add("epoch, rows/s", "fuxictr", theirs)
        table.add("CSV to test AUC, s", "ctrlib", ours)
        table.add("CSV to test AUC, s", "fuxictr", theirs)
        table.add("memory of training, MiB", "ctrlib", ours)
        table.add("memory of training, MiB", "fuxictr", theirs)
    table.add("test AUC of an epoch", "ctrlib", 0.8)
    table.add("test AUC of an epoch", "fuxictr", 0.4)
    versions = {"ctrlib": "ctrlib", "fuxictr": "fuxictr 2"}
    assert table.scores("epoch, rows/s", versions) == {"ctrlib": 30.0, "fuxictr 2": 10.0, "times fuxictr 2": 2.0}
    for measure in ("CSV to test AUC, s", "memory of training, MiB"):
        assert table.scores(measure, versions) == {"ctrlib": 30.0, "fuxictr 2": 10.0, "times fuxictr 2": 0.5}
    assert table.scores("test AUC of an epoch", versions) == {"ctrlib": 0.8, "fuxictr 2": 0.4}
    table.add("loader, rows/s", "fuxictr", 5.0)  # ctrlib was not measured: nothing to compare
    assert table.scores("loader, rows/s", versions) == {"fuxictr 2": 5.0}


# Trained parameters of FuxiCTR 2.3.7's models, those of `embedding_layer` left out, as recipes/peers/fuxictr_speed.py
# makes them, without the second bias of a logit that has two.
OF_FUXICTR = {
    "deepfm": 571_202 - 1,
    "dcnv2": 1_741_825,
    "finalmlp": 1_672_482 - 1,
    "autoint_plus": 580_642 - 1,
    "autoint": 9_441,
    "finalnet": 1_393_562,
    "gdcn": 2_909_953,
    "masknet": 2_859_841,
    "fgcnn": 11_973_671,
    "fibinet": 10_186_807,
}


def built(data: str, model: str) -> ctr.Model:
    common = speed.COMMON[data]
    features = [
        *map(ctr.Numeric, common["numbers"]),
        *(ctr.Categorical(name, num_embeddings=9) for name in common["ids"]),
    ]
    schema = ctr.Schema(tuple(features), ("label",))
    config = {"model": model, "embedding_dim": common["embedding_dim"], **speed.NETS[data][model]}
    return ctr.models.build(config, schema)


@pytest.mark.parametrize("model", get_args(speed.Model))
def test_networks_are_as_large_as_those_of_fuxictr(model: str) -> None:
    made = built("criteo", model)
    parameters = sum(weight.numel() for part in (made.tower, made.head) for weight in part.parameters())
    assert parameters == OF_FUXICTR[model]
    widths = [layer.out_features for layer in made.modules() if isinstance(layer, nn.Linear)]
    assert widths.count(400) >= (0 if model == "autoint" else 3)


@pytest.mark.parametrize("model", speed.NETS["frappe"])
def test_networks_of_frappe_are_those_that_ctrlib_builds(model: str) -> None:
    made = built("frappe", model)
    widths = [layer.out_features for layer in made.modules() if isinstance(layer, nn.Linear)]
    assert widths.count(400) >= {"autoint": 0, "finalmlp": 1}.get(model, 3)


def test_a_model_without_published_settings_is_refused(tmp_path: Path) -> None:
    knobs = speed.Knobs(data="frappe", models=("deepfm", "gdcn", "fgcnn"), work=tmp_path / "work")
    with pytest.raises(SystemExit, match=r"--data frappe has no network for fgcnn, gdcn, .* take --data criteo"):
        speed.main(knobs)
    assert set(get_args(speed.Model)) == set(speed.NETS["criteo"])


@pytest.mark.parametrize("network", [nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)), Hidden(6, (4, 1))])
def test_products_of_a_step_are_counted(network: nn.Module) -> None:
    x = torch.zeros(10, 6, requires_grad=True)  # as fields of an embedding: their gradient is needed, too
    with ctrlib_speed._products() as calls:
        torch.autograd.backward(network(x).sum())
    # Forward, and the gradients of input and weight: 2 * rows * in * out each.
    assert sum(ctrlib_speed._flops(call) * count for call, count in calls.items()) == 3 * 2 * 10 * (6 * 4 + 4 * 1)
    assert all(ctrlib_speed._seconds(call) > 0 for call in calls)
    with ctrlib_speed._products() as calls:
        torch.bmm(torch.zeros(5, 2, 3), torch.zeros(5, 3, 7))
    assert [ctrlib_speed._flops(call) for call in calls] == [2 * 5 * 2 * 3 * 7]
    (narrow,) = (ctrlib_speed._in_bf16(call) for call in calls)
    assert {dtype for *_, dtype in narrow[1]} == {torch.bfloat16}


def test_a_worker_answers_whatever_it_prints(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import os, time\nprint('noise')\nfrom worker import serve\n"
        "class Program:\n"
        "    def __init__(self, *, start): self.value = start\n"
        "    def add(self, number):\n"
        "        print('noise'); os.system('echo noise'); time.sleep(0.05)\n"
        "        self.value += number\n"
        "        return self.value\n"
        "serve(Program)\n"
    )
    lines = [{"start": 40}, {"do": "add", "with": {"number": 1}}, {"do": "add", "with": {"number": 1}}]
    read, write = os.pipe()
    environment = {"PYTHONPATH": str(ROOT / "recipes" / "peers"), "SPEED_STARTED": "0", "SPEED_ANSWERS": str(write)}
    done = subprocess.run(
        [sys.executable, str(script)],
        input="\n".join(map(json.dumps, lines)) + "\n",
        env={**os.environ, **environment},
        **{"capture_output": True, "text": True, "check": True, "pass_fds": [write]},
    )
    os.close(write)
    with os.fdopen(read) as answers:
        first, second = map(json.loads, answers)
    assert done.stdout.split() == ["noise"] * 5
    assert (first["found"], second["found"]) == (41, 42)
    assert 0.05 <= first["seconds"] < second["age"]
    assert 0 <= first["others"] <= 1
    assert 1 < first["peak_mib"] < 200


def test_ctrlib_alone_goes_the_whole_road(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measures: Any = ("step", "cold")
    knobs = speed.Knobs(rows=3000, batch_size=256, steps=2, rounds=1, threads=1, work=tmp_path, measures=measures)
    raw = speed.raw_files(knobs)
    table, machine = speed.measure_model(knobs, ["ctrlib"], raw, "deepfm")
    assert set(table.values) == {"step, rows/s", "CSV to test AUC, s", "test AUC of an epoch"}
    assert 0.5 < table.values["test AUC of an epoch"]["ctrlib"][0] < 1
    # 26 rows of width 16 and 13 numbers, filled up to 448, into 400-400-400: forward and twice backward. These and the
    # FM's sum into the logit: the gradient of what one logit reads is no product of matrices. The FM's sum of numbers
    # times vectors, and of their squares, and the wide part's: numbers need no gradient.
    flops = 6 * 256 * (448 * 400 + 2 * 400 * 400) + 4 * 256 * (401 + 13 * 16 + 13 + 13)
    assert machine["GFLOP of a step"] == pytest.approx(flops / 1e9)
    assert machine["matrix share"] == pytest.approx(machine["step products, ms"] / machine["step, ms"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="needs --raw DIR"):
        speed.raw_files(replace(knobs, data="frappe"))


def test_of_a_program_that_fails_the_end_of_its_log_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "ctrlib_speed.py").write_text(
        "from worker import Program, serve\n"
        "class Broken(Program):\n"
        "    def __init__(self, *, engine, precision, average, **setting): super().__init__(**setting)\n"
        "    def open(self, model, net): raise ValueError(f'there is no {model}')\n"
        "serve(Broken)\n"
    )
    monkeypatch.setattr(programs, "HERE", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "recipes" / "peers"))
    knobs = speed.Knobs(work=tmp_path / "work")
    with (
        speed.program_of(knobs, "ctrlib", tmp_path) as program,
        pytest.raises(RuntimeError, match=r"(?s)ended in open.*there is no no_such"),
    ):
        program.do("open", model="no_such", net={})


def test_what_was_measured_becomes_tables_and_a_picture(tmp_path: Path) -> None:
    run = {
        "task": "speed",
        "data": "criteo_synthetic, 100,000 rows",
        "engine": "fused",
        "hardware": "a AVX2, 2 threads",
    }
    path = write_results(
        tmp_path / "results.csv",
        {},
        {
            **{**run, "model": "deepfm: epoch, rows/s", "note": "3 rounds"},
            "scores": json.dumps({"ctrlib": 21200.0, "fuxictr 2.3.7": 8500.0, "times fuxictr 2.3.7": 2.49}),
        },
        {
            **{**run, "model": "deepfm: memory of training, MiB", "note": "3 rounds"},
            "scores": json.dumps({"ctrlib": 600.5, "deepctr-torch 0.3.0": 900.0, "times deepctr-torch 0.3.0": 1.5}),
        },
        {**run, "model": "deepfm: machine", "scores": json.dumps({"GFLOP/s": 105.0, "matrix share": 0.6912})},
    )
    readme, page = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text(f"{results.BEGIN}\n{results.END}\n")
    results.main(results.Arguments(path, readme, page))
    section = page.read_text().partition("## Speed")[2]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| criteo")]
    common = ["criteo_synthetic, 100,000 rows", "deepfm", "fused"]
    behind = ["a AVX2, 2 threads", "3 rounds"]
    assert lines == [
        [*common, "epoch, rows/s", "21,200", "8,500 (2.49x)", "", *behind],
        [*common, "memory of training, MiB", "600.5", "", "900 (1.50x)", *behind],
        [*common, "105", "0.6912", "a AVX2, 2 threads"],
    ]
    picture = page.with_name("speed.svg").read_text()
    for text in ("2.49", "1.50", "criteo, deepfm: epoch", "fuxictr 2.3.7", "deepctr-torch 0.3.0"):
        assert f">{text}<" in picture
    results.main(results.Arguments(path, readme, page))
    assert page.with_name("speed.svg").read_text() == picture
