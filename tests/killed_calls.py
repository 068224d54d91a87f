"""Every command that writes, killed by SIGKILL before each of its file operations; then the same command again.

    python tests/killed_calls.py --help

On tiny data, a run of each command is first traced (`tests/traced_calls.py`), and its calls that change the folder it
works in are listed. Then it is started once for each of these calls, and killed before that one. What a reader finds
then must be what was there before, or the new; and the same command, undisturbed, must end with exit status 0 and with
the files of a run that nothing happened to: names, modes, and bytes but for `CLOCKS`. Anything else makes the exit code
1. Where only the lock was still to be given back, all was done: the same command may then refuse to do it again.

Calls are told apart by kind, path and how many of these came before, since those of several threads come in any order.
All runs are children of one process, which has everything imported.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", POLARS_MAX_THREADS="1")  # read as torch and polars are imported

import tyro
from forking import be_ready, import_all, import_everything
from rich.console import Console
from rich.table import Table
from traced_calls import Call, run_alone, run_traced, why_not

# What differs by design, by name of the file: entries that a clock says.
SPEEDS = ("seconds", "samples_per_second", "inference_samples_per_second")
CLOCKS = {
    "log.jsonl": SPEEDS[:2],
    "metrics.json": SPEEDS,
    "comparison.json": (*SPEEDS, "seconds_sd"),
    "trials.json": ("seconds",),
}
PROGRESS = 30.0  # seconds between lines that say how far it is
ATTEMPTS = 3  # for a call that a run does not come by: a thread may have cut its writing otherwise
State = dict[str, tuple[int, str]]  # path -> mode and sha256


@dataclass(frozen=True)
class Scenario:
    """A command that writes `out`, in a folder that holds copies of `takes`."""

    title: str
    arguments: str
    takes: tuple[str, ...]  # NAME, or NAME:OTHER for a copy that is called OTHER
    out: str = "out"
    again: str = "already: give another --out, or --overwrite"  # how it is refused once all is done


FEATURES = "--label click --group user --numeric price:log --multi tags --ignore user"
TRAIN = "--model deepfm --dim 4 --hidden 8 --dropout 0.1 --batch-size 128 --learning-rate 0.05 --seed 1 --no-baselines"
STEPS = "--checkpoint-seconds 0"  # a checkpoint after each of the two steps of an epoch
SEARCH = "--setting epochs=2 --model deepfm --dim 4 --hidden 8 --batch-size 128 --epochs 2 --learning-rate 0.01"
COMPARE = "compare data --models fm.json mlp.json --seeds 2 --out out"
BASE = {  # what is there before, and how it is made
    "data": f"prepare rows.csv --out data {FEATURES}",
    "older_data": f"prepare older.csv --out older_data {FEATURES}",
    "model": f"train data --out model {TRAIN} --epochs 1",
    "older_model": "train data --out older_model --model deepfm --dim 4 --hidden 4 --batch-size 64 --epochs 1 --seed 2 "
    "--no-baselines",
    "older_small": "compress model data --ratio 3 --epochs 0 --out older_small",
    "older_comparison": "compare data --models fm.json mlp.json --seeds 2 --seed 7 --out older_comparison",
    "older_search": "tune data --models fm --trials 1 --seed 7 --out older_search",
    "log_data": "prepare log.csv --out log_data --label click --split-by ts --time ts --history item:user:max_length=3 "
    "--rate item",
    "log_model": "train log_data --out log_model --model din --dim 4 --batch-size 64 --epochs 1 --no-baselines",
    "older.parquet": "predict older_model today.csv --out older.parquet",
}
SCENARIOS = (
    Scenario("prepare", f"prepare rows.csv --out out {FEATURES}", ("rows.csv",)),
    Scenario("prepare --overwrite", f"prepare rows.csv --out out {FEATURES} --overwrite",
             ("rows.csv", "older_data:out")),
    Scenario("train --engine exact", f"train data --out out {TRAIN} {STEPS} --epochs 2", ("data",)),
    Scenario("train --engine fused", f"train data --out out {TRAIN} {STEPS} --epochs 1 --engine fused",
             ("data",)),
    Scenario("train --overwrite", f"train data --out out {TRAIN} --epochs 1 --overwrite", ("data", "older_model:out")),
    Scenario("search optfs", f"search optfs data --out out {SEARCH}", ("data",)),
    Scenario("compress", "compress model data --ratio 2 --out out --batch-size 64", ("model", "data")),
    Scenario("compress --overwrite", "compress model data --ratio 2 --out out --epochs 0 --overwrite",
             ("model", "data", "older_small:out")),
    Scenario("predict", "predict model today.csv --out out.csv --keep user", ("model", "today.csv"), "out.csv"),
    Scenario("predict --overwrite", "predict model today.csv --out out.parquet --overwrite",
             ("model", "today.csv", "older.parquet:out.parquet"), "out.parquet"),
    Scenario("compare", f"{COMPARE}", ("data", "fm.json", "mlp.json")),
    Scenario("compare --overwrite", f"{COMPARE} --overwrite",
             ("data", "fm.json", "mlp.json", "older_comparison:out")),
    Scenario("tune", "tune data --models fm --trials 2 --out out", ("data",)),
    Scenario("tune --overwrite", "tune data --models fm --trials 2 --out out --overwrite",
             ("data", "older_search:out")),
    Scenario("update", "update out tomorrow.csv", ("log_model:out", "tomorrow.csv"),
             again="not after the last event that is known"),
)  # fmt: skip


@dataclass(frozen=True)
class Trials:
    """What is killed, and how often."""

    only: tuple[str, ...] = ()
    """Words of what is in the first column of the table, such as train or fused; otherwise all."""
    every: int = 1
    """Kill at every so many-th of the calls that were found."""
    jobs: int = 2
    """Processes that kill at the same time."""


@dataclass
class Row:
    """What came of a scenario."""

    scenario: Scenario
    found: int = 0
    tried: int = 0
    hit: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def ctrlib(arguments: str, place: Path, listed: Path | None = None) -> int:
    """Run a command in a folder; only ever in a child. `listed`: where to write what is imported then."""
    import torch

    from ctrlib import cli

    torch.set_num_threads(1)
    os.chdir(place)
    status = cli.main(arguments.split())
    if listed is not None:
        listed.write_text("\n".join(sys.modules))
    return status


def state_of(place: Path) -> State:
    """All that is in a folder, bit by bit; without what a clock says."""
    found: State = {}
    for path in sorted(place.rglob("*")):
        content = b"" if path.is_dir() else path.read_bytes()
        if path.name in CLOCKS and content:
            lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
            read = [json.loads(line) for line in lines]
            content = json.dumps(without(CLOCKS[path.name], read)).encode()
        digest = "a folder" if path.is_dir() else hashlib.sha256(content).hexdigest()
        found[path.relative_to(place).as_posix()] = (path.stat().st_mode, digest)
    return found


def without(names: tuple[str, ...], value: Any) -> Any:
    """The same without these entries, however deep they are."""
    if isinstance(value, dict):
        return {name: without(names, one) for name, one in value.items() if name not in names}
    return [without(names, one) for one in value] if isinstance(value, list) else value


def difference(found: State, expected: State) -> str:
    """Where two states differ, in words; nothing if they are equal."""
    left = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    changed = [name for name in found if name in expected and found[name] != expected[name]]
    said = (("there is also", left), ("missing", missing), ("other bits or another mode", changed))
    return "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in said if names)


class Killer:
    """Runs a scenario and kills it."""

    def __init__(self, scenario: Scenario, base: Path, folder: Path) -> None:
        self.scenario, self.base, self.place = scenario, base, folder / "place"
        self.output = folder / "output"
        self.old: State = {}  # what a reader sees before the command,
        self.new: State = {}  # and after it
        self.state: State = {}  # all that is there after it
        self.names: set[str] = set()  # files of `out` that belong together

    def begin(self) -> None:
        """The folder as it is before the command."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for take in self.scenario.takes:
            name, _, other = take.partition(":")
            source, target = self.base / name, self.place / (other or name)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy2(source, target)

    def work(self) -> int:
        return ctrlib(self.scenario.arguments, self.place)

    def expect(self) -> list[Call]:
        """Learn what an undisturbed run does and leaves; the calls.

        Raises:
            RuntimeError: it fails, or two of them leave different bits.
        """
        self.begin()
        self.names = self._names()
        traced = run_traced(self.work, self.place, output=self.output)
        if traced.status:
            raise RuntimeError(f"{self.scenario.arguments} ends with {traced.status}:\n{self.output.read_text()}")
        once = state_of(self.place)
        self.names |= self._names()
        self.new = self._whole()
        self.begin()
        self.old = self._whole()
        run_alone(self.work, self.output)
        self.state = state_of(self.place)
        if differs := difference(once, self.state):
            raise RuntimeError(f"{self.scenario.title}: two undisturbed runs differ: {differs}")
        if hidden := [name for name in once if "/." in f"/{name}"]:
            raise RuntimeError(f"{self.scenario.title}: an undisturbed run leaves {hidden}")
        strange = [path for path in traced.elsewhere if not path.startswith(str(self.output))]
        if strange or traced.unseen:
            print(f"{self.scenario.title}: not looked at: written elsewhere {strange}, mapped {traced.unseen}")
        return traced.calls

    def kill(self, call: Call) -> tuple[bool, str]:
        """Kill before that call and start again; whether the run came by it, and what is wrong, if anything is."""
        for _ in range(ATTEMPTS):
            self.begin()
            traced = run_traced(self.work, self.place, call, output=self.output)
            if traced.killed:
                break
            if traced.status:
                return False, f"ended with {traced.status}: {self._said()}"
        if traced.killed and (found := self._seen()) not in (self.old, self.new):
            lacking, beside = (difference(found, whole) for whole in (self.new, self.old))
            return True, f"a reader finds a mixture (to the new: {lacking}; to the old: {beside})"
        # All is in place, or will be once somebody looks: what was done is refused, as it would be without a kill.
        status = run_alone(self.work, self.output) if traced.killed else 0
        if status and self.scenario.again not in self._said():  # and that it was done is seen below
            return traced.killed, f"the same command ends with {status}: {self._said()}"
        if differs := difference(state_of(self.place), self.state):
            return traced.killed, f"the same command leaves other files: {differs}"
        return traced.killed, ""

    def _said(self) -> str:
        return " ".join(self.output.read_text().split())[-400:]

    def _names(self) -> set[str]:
        """The files of the folder that belong together."""
        from ctrlib.manifest import manifest_of

        out = self.place / self.scenario.out
        manifest = manifest_of(out) if (out / "MANIFEST").exists() else None
        return {"MANIFEST", *manifest.files} if manifest is not None else set()

    def _whole(self) -> State:
        """What a reader sees of these files, or of the one that is written."""
        out = self.place / self.scenario.out
        found = state_of(self.place)
        names = {f"{self.scenario.out}/{name}" for name in self.names} if out.suffix == "" else {self.scenario.out}
        return {name: each for name, each in found.items() if name in names}

    def _seen(self) -> State:
        """The same after a kill: a reader finishes a replacement that was begun. What the rerun finds is untouched."""
        from ctrlib.making import settle

        kept = self.place.with_name("kept")
        shutil.copytree(self.place, kept)
        settle(self.place / self.scenario.out)
        found = self._whole()
        shutil.rmtree(self.place)
        kept.rename(self.place)
        return found


def rows(path: Path, seed: int, num_rows: int, *, labels: bool) -> None:
    """A raw file with every kind of column but histories."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "tags", "price", *(["click"] if labels else [])])
        for _ in range(num_rows):
            item = rng.randrange(30)
            tags = "|".join(f"t{rng.randrange(9)}" for _ in range(rng.randrange(4)))
            row = [f"u{rng.randrange(12)}", f"i{item}", tags, round(rng.expovariate(1), 3)]
            writer.writerow([*row, *([int(rng.random() < (0.2 + 0.02 * item))] if labels else [])])


def make_base(base: Path, scenarios: list[Scenario]) -> None:
    """Everything that the scenarios take. On the way it is learnt what commands import besides."""
    from ctrlib import cli
    from ctrlib.cli import usage

    base.mkdir()
    rows(base / "rows.csv", 1, 260, labels=True)
    rows(base / "older.csv", 2, 200, labels=True)
    rows(base / "today.csv", 3, 50, labels=False)
    for model in ("fm", "mlp"):
        how = {"max_epochs": 1, "batch_size": 128}
        (base / f"{model}.json").write_text(json.dumps({"model": model, "embedding_dim": 4, "training": how}))
    lines = (base / "rows.csv").read_text().splitlines()
    for name, part in (("log.csv", range(1, 201)), ("tomorrow.csv", range(201, 261))):
        timed = [f"ts,{lines[0]}", *(f"{number},{lines[number]}" for number in part)]
        (base / name).write_text("\n".join(timed) + "\n")
    output, listed = base.with_name("output"), base.with_name("imported")

    def make(name: str) -> None:
        if name not in BASE or (base / name).exists():
            return
        for word in BASE[name].split():
            if word != name:
                make(word)
        if status := run_alone(functools.partial(ctrlib, BASE[name], base, listed), output):
            raise RuntimeError(f"{BASE[name]} ends with {status}:\n{output.read_text()}")
        import_all(listed.read_text().split())

    for scenario in scenarios:
        for take in scenario.takes:
            make(take.partition(":")[0])
    # Arguments are taken apart once for all children.
    known: dict[tuple[str, ...], Any] = {}
    parse = usage.parse

    def parse_once(command: type, prog: str, arguments: list[str]) -> Any:
        key = (prog, *arguments)
        if key not in known:
            known[key] = parse(command, prog, arguments)
        return known[key]

    usage.parse = parse_once
    for scenario in SCENARIOS:
        name, *arguments = scenario.arguments.split()
        parse_once(cli.command_class(name), f"ctrlib {name}", arguments)
    # Pictures stay blank: to draw them takes longer than all else, and what is written of them comes the same way.
    importlib.import_module("matplotlib.figure").Figure.draw = lambda figure, renderer: None
    be_ready()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def kill_some(killer: Killer, calls: list[Call], report: Path) -> None:
    """In a child: kill at these, and write a line for each."""
    with report.open("a", buffering=1) as file:
        for call in calls:
            hit, failure = killer.kill(call)
            file.write(json.dumps([hit, f"killed at {call}: {failure}" if failure else ""]) + "\n")


def kill_everywhere(scenario: Scenario, base: Path, folder: Path, trials: Trials) -> Row:
    row = Row(scenario)
    started = time.monotonic()
    places = [folder / f"{scenario.title}-{job}".replace(" ", "_") for job in range(trials.jobs)]
    killers = [Killer(scenario, base, place) for place in places]
    calls = killers[0].expect()
    row.found, row.kinds = len(calls), Counter(call.kind for call in calls)
    calls = calls[:: trials.every]
    say(f"{scenario.title}: {row.found} calls found, killed at {len(calls)}")
    children, reports, shown = [], [], started
    for job, killer in enumerate(killers):
        killer.old, killer.new, killer.names, killer.state = (
            killers[0].old, killers[0].new, killers[0].names, killers[0].state)  # fmt: skip
        reports.append(killer.place.with_name("report"))
        killer.place.parent.mkdir(parents=True, exist_ok=True)
        reports[-1].touch()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                kill_some(killer, calls[job :: trials.jobs], reports[-1])
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            if os.waitstatus_to_exitcode(status):
                row.failures.append("a process that kills died itself; what it said is above")
            continue
        time.sleep(0.2)
        if (now := time.monotonic()) - shown >= PROGRESS:
            shown = now
            done = sum(report.read_text().count("\n") for report in reports)
            say(f"{scenario.title}: {done} of {len(calls)}, {now - started:.0f} s")
    for hit, failure in (json.loads(line) for report in reports for line in report.read_text().splitlines()):
        row.tried += 1
        row.hit += hit
        if failure:
            row.failures.append(failure)
    row.seconds = time.monotonic() - started
    say(f"{scenario.title}: {row.hit} hit, {len(row.failures)} failures, {row.seconds:.0f} s")
    return row


def show(found: list[Row]) -> Table:
    table = Table("command", "calls found", "killed at", "hit", "ended right", "seconds", "kinds of calls")
    for row in found:
        right = row.tried - len(row.failures)
        colour = "green" if not row.failures else "bold red"
        kinds = ", ".join(f"{number} {kind}" for kind, number in row.kinds.most_common())
        numbers = map(str, (row.found, row.tried, row.hit))
        table.add_row(row.scenario.title, *numbers, f"[{colour}]{right}[/]", f"{row.seconds:.0f}", kinds)
    return table


def main(trials: Trials) -> int:
    if lacking := why_not():
        print(lacking, file=sys.stderr)
        return 2
    words = {word for scenario in SCENARIOS for word in scenario.title.split()}
    if unknown := set(trials.only) - words:
        print(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(sorted(words))}", file=sys.stderr)
        return 2
    import_everything()
    folder = Path(tempfile.mkdtemp(prefix="ctrlib-kills-"))
    wanted = [one for one in SCENARIOS if not trials.only or set(one.title.split()) & set(trials.only)]
    make_base(folder / "base", wanted)
    found = [kill_everywhere(scenario, folder / "base", folder, trials) for scenario in wanted]
    Console().print(show(found))
    failures = [f"{row.scenario.title}: {failure}" for row in found for failure in row.failures]
    for failure in failures:
        print(failure)
    shutil.rmtree(folder)
    tried, hit = sum(row.tried for row in found), sum(row.hit for row in found)
    print(f"{tried} kills, {hit} of them at the call that was meant, {len(failures)} not survived")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Trials, description=__doc__)))
