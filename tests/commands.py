"""Every command that writes, where it is hard to write: two at once in one folder, on a full disk, where nobody may.

    python tests/commands.py --help

Commands run in forked processes of a parent without threads, which has imported everything already. A trial that ends
otherwise than it must makes the exit code 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import polars as pl
import torch
import tyro
from forking import be_ready, import_all, import_everything
from matplotlib.figure import Figure

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.data.events import Events, History
from ctrlib.data.synthetic import Teacher, generate

FORK = multiprocessing.get_context("fork")
QUICK = "--model deepfm --dim 4 --hidden 4 --epochs 2 --batch-size 64"
# What a command is called here -> the command without --out; `{}` is a folder with data, model, rows.csv and today.csv.
COMMANDS = {
    "prepare": "prepare {}/rows.csv",
    "prepare --like": "prepare {}/rows.csv --like {}/data",
    "train": f"train {{}}/data {QUICK}",
    "train --warm-start": f"train {{}}/data {QUICK} --warm-start {{}}/model",
    "train, fused": f"train {{}}/data {QUICK} --engine fused",
    "search": f"search optfs {{}}/data {QUICK} --setting epochs=2",
    "compress": "compress {}/model {}/data --ratio 2",
    "rank": "rank {}/rows.csv",
    "compare": "compare {}/data --models {}/quick/fm.json {}/quick/mlp.json --seeds 2",
    "tune": "tune {}/data --models fm --trials 2",
    "update": "update",  # what lies at --out, and what it takes there, say BEFORE and `arguments_of`
    "predict": "predict {}/model {}/today.csv --keep C1",
    "predict, parquet": "predict {}/model {}/today.csv --keep C1",
}
BEFORE = {"update": "events_model"}  # what a command changes in its place, having no --out: a copy of this
FIXED = [("train", "train"), ("prepare", "train")]  # the first pairs
CONFIG: dict[str, Any] = {"model": "deepfm", "embedding_dim": 4, "hidden": [4]}
BUSY = r"ctrlib: {out} is being written already, by process {pid} on \S+ since [\d-]+ [\d:]+ UTC \({command}\): "
LIMIT = 300  # seconds that a command may take
FULL = r"[\d,]+ bytes (are needed|needed)|needs \d+ bytes"


@dataclass(frozen=True)
class Trials:
    """How much is tried."""

    pairs: int = 20
    """Pairs of commands that are started at once with one --out."""
    full_disks: int = 8
    """Sizes that a file may have, for each command, into a new place and over an old one."""
    read_only: int = 1
    """Whether each command is tried where nobody may write."""
    seed: int = 0
    only: tuple[str, ...] = ()
    """Parts of the names of the commands whose disks are tried; otherwise all."""

    def wanted(self) -> list[str]:
        """The commands whose disks are tried."""
        return [name for name in COMMANDS if not self.only or any(part in name for part in self.only)]


def out_of(command: str, folder: Path, name: str) -> Path:
    """Where a command writes."""
    return folder / (name + {"predict": ".csv", "predict, parquet": ".parquet"}.get(command, ""))


def arguments_of(command: str, home: Path, out: Path, *more: str) -> list[str]:
    if command in BEFORE:
        return [command, str(out), str(home / "tomorrow.csv")]
    return [*COMMANDS[command].replace("{}", str(home)).split(), "--out", str(out), *more]


def put(command: str, home: Path, out: Path) -> None:
    """What a command finds at --out in any case."""
    if command in BEFORE:
        shutil.copytree(home / BEFORE[command], out)


def make_home(home: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    frame, _ = generate(Teacher(num_rows=1200, cardinalities=(40, 20), num_numeric=1, seed=1))
    home.mkdir()
    frame.write_csv(home / "rows.csv")
    frame.drop("label").write_csv(home / "today.csv")
    ctr.prepare(home / "rows.csv", home / "data", labels="label", log=None)
    torch.manual_seed(0)
    (home / "quick").mkdir()
    how = {"max_epochs": 1, "batch_size": 64}
    for name in ("fm", "mlp"):
        text = json.dumps({"model": name, "embedding_dim": 4, "training": how})
        (home / "quick" / f"{name}.json").write_text(text)
    if "update" in wanted:
        make_log(home, frame)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        for command in ("train", *({"compare", "tune"} & set(wanted))):
            if cli.main(arguments_of(command, home, home / "unused")):
                raise RuntimeError(said.getvalue())
            shutil.rmtree(home / "unused")
    home.with_name("imported").write_text("\n".join(sys.modules))  # what commands would import that are forked later


def make_log(home: Path, frame: pl.DataFrame) -> None:
    """A model whose columns are made of events, and later ones."""
    log = frame.with_row_index("ts")
    log[800:].write_csv(home / "tomorrow.csv")
    events = Events("ts", [History("C1", "C2", 3)], ["C1"])
    ctr.prepare(log[:800], home / "events", labels="label", split_by="ts", events=events, log=None)
    of_events = {"model": "din", "embedding_dim": 4}
    schema = ctr.Schema.load(home / "events")
    ctr.save_model(models.build(of_events, schema), of_events, home / "events", home / "events_model")
    ctr.save_model(models.build(CONFIG, ctr.Schema.load(home / "data")), CONFIG, home / "data", home / "model")


# ---- processes


def _child(arguments: list[str], answer: int, ready: Any, before: Callable[[], None]) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(answer, stream)
    sys.argv = ["ctrlib", *arguments]
    before()
    if ready is not None:
        ready.wait()
    status = cli.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def together(commands: list[list[str]], before: Callable[[], None] = lambda: None) -> list[tuple[int, int, str]]:
    """Process id, exit code and answer of commands that start at the same moment."""
    ready = FORK.Barrier(len(commands)) if len(commands) > 1 else None
    started = []
    for arguments in commands:
        reader, writer = os.pipe()  # a file could not grow on a full disk
        process = FORK.Process(target=_child, args=(arguments, writer, ready, before))
        process.start()
        os.close(writer)
        started.append((process, reader))
    ends = []
    for process, reader in started:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as pipe:
            said = pipe.read()
        process.join()
        ends.append((process.pid or 0, process.exitcode or 0, said))
    return ends


def alone(command: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    ((_, status, said),) = together([command], before)
    return status, said


def contents(path: Path) -> dict[str, str]:
    """Name of each file -> hash of its bytes, hidden ones too."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}


def result_of(out: Path) -> str:
    """What a command made, without the times that it notes: the checksums of a folder, or the bytes of a file."""
    names = [name for name in ("ranking.json", "best.json") if (out / name).exists()] if out.is_dir() else [""]
    names += sorted(str(path.relative_to(out)) for path in out.rglob("MANIFEST"))
    return " ".join(hashlib.sha256((out / name).read_bytes()).hexdigest()[:12] for name in names) or "nothing"


def hidden(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


class WrongError(Exception):
    """What happened instead."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise WrongError(what)


# ---- the trials


class Suite:
    """All trials; `failures` has what went wrong."""

    def __init__(self, trials: Trials, folder: Path) -> None:
        self.trials, self.folder, self.home = trials, folder, folder / "home"
        self.failures: list[str] = []
        self.counts: dict[str, list[int]] = {}
        self.references: dict[str, str] = {}
        import_everything()
        wanted = trials.wanted() if trials.pairs <= len(FIXED) else list(COMMANDS)
        making = FORK.Process(target=make_home, args=(self.home, wanted))
        making.start()
        making.join()
        import_all((folder / "imported").read_text().split())
        be_ready()
        folder.chmod(0o755)
        self.before = contents(self.home)

    def trial(self, kind: str, name: str, act: Callable[[Path], None]) -> None:
        count = self.counts.setdefault(kind, [0, 0])
        folder = self.folder / re.sub(r"\W+", "-", f"{kind} {name}")
        folder.mkdir()
        count[0] += 1
        try:
            act(folder)
            expect(contents(self.home) == self.before, "an input is another one now")
            count[1] += 1
            shutil.rmtree(folder, ignore_errors=True)
        except WrongError as what:
            self.failures.append(f"{kind}, {name}: {what}")
        print(f"{kind}, {name}: {count[1]} of {count[0]}", file=sys.stderr)

    def reference(self, command: str) -> str:
        """What it makes when nothing is in its way."""
        if command not in self.references:
            folder = self.folder / f"reference {command}"
            folder.mkdir(exist_ok=True)
            out = out_of(command, folder, "out")
            put(command, self.home, out)
            status, said = alone(arguments_of(command, self.home, out))
            expect(status == 0, f"{command}: {said}")
            expect(not hidden(folder), f"{command} leaves {hidden(folder)}")
            self.references[command] = result_of(out)
        return self.references[command]

    def all(self) -> None:
        trials, chance = self.trials, random.Random(self.trials.seed)
        folders = [name for name in COMMANDS if "predict" not in name and name not in BEFORE]
        pairs = [(name, name) for name in COMMANDS] + [(one, two) for one in folders for two in folders if one < two]
        commands = trials.wanted()
        for number in range(trials.pairs):
            one, two = FIXED[number] if number < len(FIXED) else pairs[(number - len(FIXED)) % len(pairs)]
            if number > len(COMMANDS):
                one, two = chance.choice(pairs)
            self.trial("two at once", f"{number} {one}, {two}", lambda folder, a=one, b=two: self.rivals(folder, a, b))
        for name in commands if trials.full_disks else ():
            for over in (False, True) if name not in BEFORE else (False,):
                what = f"{name}{' --overwrite' if over else ''}"
                self.trial("full disk", what, lambda folder, n=name, o=over: self.full_disk(folder, n, o))
        for name in commands if trials.read_only else ():
            self.trial("read-only", name, lambda folder, n=name: self.read_only(folder, n))

    def rivals(self, folder: Path, one: str, two: str) -> None:
        """One finishes, and has made what it makes alone; the other says who holds the place."""
        out = out_of(one, folder, "out")
        put(one, self.home, out)
        ends = together([arguments_of(name, self.home, out) for name in (one, two)])
        codes = [status for _, status, _ in ends]
        expect(sorted(map(str, codes)) == ["0", "1"], f"exit codes {codes}: {[said for *_, said in ends]}")
        first = codes.index(0)
        winner = (one, two)[first]
        command = re.escape(" ".join(["ctrlib", *arguments_of(winner, self.home, out)])[:300])
        said = ends[1 - first][2]
        expect(re.search(BUSY.format(out=out, pid=ends[first][0], command=command), said), f"the other says {said}")
        expect(said.count("\n") == 1, f"the other says more than one line: {said}")
        expect(result_of(out) == self.reference(winner), f"{winner} has made something else than alone")
        expect(not hidden(folder), f"left over: {hidden(folder)}")

    def full_disk(self, folder: Path, command: str, over: bool) -> None:
        """No file may grow beyond a size: the old state stays, bytes are named, and with more room it is made."""
        out = out_of(command, folder, "out")
        reference = self.reference(command)
        put(command, self.home, out)
        if over:
            status, said = alone(arguments_of(command, self.home, out))
            expect(status == 0, said)
        sizes = sorted([0, 200, 40, 1500, 5000, 700, 3000, 12000, 8000, 20000, 40000][: self.trials.full_disks])
        for size in sizes:
            before = contents(out) if out.exists() else None

            def limit(size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            status, said = alone(arguments_of(command, self.home, out, *["--overwrite"] * over), limit)
            if status == 0:
                break
            *_, last = said.splitlines() or [""]
            expect(status == 1 and last.startswith("ctrlib: "), f"{size}: exit code {status}: {said}")
            expect("Traceback" not in said, f"{size}: {said}")
            expect(re.search(FULL, last), f"{size}: no bytes are named: {last}")
            # A ranking of raw files prepares them in a temporary folder first.
            expect(str(out) in last or command.startswith("rank"), f"{size}: {out} is not named: {last}")
            after = contents(out) if out.exists() else None
            unlike = [name for name in before or {} if (after or {}).get(name) != (before or {})[name]]
            unlike = [name for name in unlike if Path(name).name != "log.jsonl"]  # which tells of the newest run
            expect(not unlike, f"{size}: the old {unlike} are not as they were")
            if before is None and not command.startswith(("train", "search", "compare", "tune")):  # which go on
                expect(after is None, f"{size}: {out} is there")
        else:
            status, said = alone(arguments_of(command, self.home, out, *["--overwrite"] * over))
            expect(status == 0, f"with room again: {said}")
        expect(result_of(out) == reference, "with room again it makes something else")
        expect(not hidden(folder), f"left over: {hidden(folder)}")

    def read_only(self, folder: Path, command: str) -> None:
        """A folder without the right to write, and one where a file is: root is somebody else for this."""
        place = folder / "place"
        place.mkdir()
        old = out_of(command, place, "old")
        put(command, self.home, old)
        status, said = alone(arguments_of(command, self.home, old))
        expect(status == 0, said)
        new, below = out_of(command, place, "new"), out_of(command, self.home / "rows.csv", "deep/er")
        before = contents(place)
        for path in (place, *(path for path in place.rglob("*") if path.is_dir())):
            path.chmod(0o555)
        try:
            trials = ((old, []),) if command in BEFORE else ((old, ["--overwrite"]), (new, []), (below, []))
            for out, more in trials:
                status, said = alone(arguments_of(command, self.home, out, *more), become_nobody)
                expect(status == 1 and said.startswith("ctrlib: "), f"exit code {status}: {said}")
                expect(said.count("\n") == 1, f"more than one line: {said}")
                named = out if command in BEFORE else f"--out {out}"
                expect(said.startswith(f"ctrlib: {named}: "), said)
                expect("may not be written" in said or "is a file" in said, said)
                expect(("give another --out" in said) == (command not in BEFORE), f"no cure, or one too many: {said}")
                expect(contents(place) == before, "the old state is not as it was")
        finally:
            for path in (place, *(path for path in place.rglob("*") if path.is_dir())):
                path.chmod(0o755)


def become_nobody() -> None:
    """Root may write whatever the mode says."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def main(trials: Trials) -> int:
    if not trials.full_disks:  # Pictures stay blank unless their size counts: to draw them takes longer than all else.
        Figure.draw = lambda figure, renderer: None
    folder = Path(tempfile.mkdtemp(prefix="ctrlib-commands-"))
    suite = Suite(trials, folder)
    suite.all()
    for kind, (tried, good) in suite.counts.items():
        print(f"{kind}: {good} of {tried} as they must be")
    for failure in suite.failures:
        print(failure)
    if not suite.failures:
        shutil.rmtree(folder)
    return bool(suite.failures)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Trials, description=__doc__)))
