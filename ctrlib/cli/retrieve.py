"""`ctrlib retrieve`: from a log of who had to do with what to the best items of every user."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ctrlib._target import target
from ctrlib.cli.flags import Command, parse_option
from ctrlib.cli.kinds import OptionalName, OptionalPath, Settings, Switch, shown
from ctrlib.cli.tables import new_table, show
from ctrlib.cli.usage import fill
from ctrlib.errors import ArgumentError, check_whole

if TYPE_CHECKING:
    from ctrlib.retrieval.interactions import Log

Action = Literal["train", "recommend", "evaluate"]
Method = Literal["ultragcn", "ials", "ease", "itemcf", "popularity"]
ACTIONS = (
    "What to do. train: LOG to a folder. recommend: FOLDER to a parquet file with the best items of every user, or of "
    "new users whose log follows. evaluate: FOLDER and a LOG that training did not have."
)


@dataclass(frozen=True)
class LogFlags:
    """How logs are read."""

    user: OptionalName = None
    """Column of users, of pairs in CSV, TSV or parquet; otherwise user_id, user, userId or uid."""
    item: OptionalName = None
    """Column of items; otherwise item_id, item, itemId or iid."""
    format: Literal["auto", "pairs", "lists"] = "auto"
    """lists: lines `user item item ...` of whole numbers; auto knows them by their first lines."""


@dataclass(frozen=True)
class Output:
    """What is written, by train and recommend."""

    out: OptionalPath = None
    """train: folder for what was learnt. recommend: parquet file for user, item, rank and score."""
    overwrite: Switch = False
    """Replace what is there."""


@dataclass(frozen=True)
class TrainFlags:
    """How train learns."""

    method: Method = "ultragcn"
    """What learns: UltraGCN, or what it is to be measured against."""
    option: Settings = ()
    """Settings of the method, with values in JSON: embedding_dim=128 l2=1e-4 epochs=10"""
    test: OptionalPath = None
    """A log to report on once."""
    valid_share: float = 0.1
    """Share of the pairs held out to choose the epoch by; then all pairs are trained on. 0: train all epochs once."""
    metric: str = "recall@20"
    """What the epoch is chosen by."""
    every: int = 1
    """Epochs from one look at the metric to the next."""
    select_on_test: Switch = False
    """Choose the epoch on --test, as published numbers do; also lets evaluate do so. The record says so."""
    seed: int = 0
    """Number that all draws come from."""


@dataclass(frozen=True)
class ListFlags:
    """How many items, and what counts."""

    k: int = 20
    """Items of each user."""
    with_seen: Switch = False
    """recommend: do not leave out what a user has already."""
    over: Literal["with_test", "all"] = "with_test"
    """Users that metrics are means over: those with relevant items, or all of training, as in UltraGCN's program."""


@dataclass(frozen=True)
class Retrieve(Command):
    """Learn from a log of users and items, and list the best items.

    Logs are pairs of user and item (CSV, TSV, parquet, ...) or lines `user item item ...`, packed or not.

    Examples:

        ctrlib retrieve train log.csv --method ials --out runs/ials
        ctrlib retrieve recommend runs/ials --k 50 --out lists.parquet
        ctrlib retrieve recommend runs/ials new_users.csv --out new.parquet
        ctrlib retrieve evaluate runs/ials next_week.csv
    """

    action: Annotated[Positional[Action], arg(help=ACTIONS)]
    path: Positional[Path]
    """train: the log. Otherwise the folder that train wrote."""
    log: Annotated[Positional[OptionalPath], shown("[LOG]")] = None
    """evaluate: the log. recommend: new users' log, who are known by their items alone."""
    output: Output = field(default_factory=Output)
    logs: LogFlags = field(default_factory=LogFlags)
    train: TrainFlags = field(default_factory=TrainFlags)
    lists: ListFlags = field(default_factory=ListFlags)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        check_whole(1, k=self.lists.k, every=self.train.every)
        check_whole(0, seed=self.train.seed)
        self._check_flags()
        if self.action == "train":
            return self._train()
        from ctrlib.retrieval.folder import check_retrieval

        check_retrieval(self.path)
        return self._recommend() if self.action == "recommend" else self._evaluate()

    def _check_flags(self) -> None:
        """Refuse what the action does not look at."""
        of_train = {"--method", "--option", "--test", "--valid-share", "--metric", "--every", "--seed"}
        idle = {
            "train": {"--with-seen"},
            "recommend": {*of_train, "--select-on-test", "--over"},
            "evaluate": {*of_train, "--out", "--overwrite", "--with-seen"},
        }[self.action]
        if wrong := sorted(idle & self.given):
            raise ArgumentError(f"`ctrlib retrieve {self.action}` takes no {' or '.join(wrong)}: leave that out")
        needs_log, may_have_log = self.action == "evaluate", self.action != "train"
        if needs_log and self.log is None:
            raise ArgumentError("`ctrlib retrieve evaluate FOLDER LOG` needs a log that training did not have")
        if self.log is not None and not may_have_log:
            raise ArgumentError(f"`ctrlib retrieve train LOG` takes one log, {self.log} is one too many: see --test")
        if self.action != "evaluate" and self.output.out is None:
            raise ArgumentError(f"`ctrlib retrieve {self.action}` needs --out")

    def _read(self, path: Path) -> Log:
        from ctrlib.retrieval.interactions import read_log

        return read_log(path, user=self.logs.user, item=self.logs.item, format=self.logs.format)

    def _train(self) -> int:
        how, out = self.train, self.output.out
        assert out is not None
        config: dict[str, Any] = {"method": how.method}
        for name, value in map(parse_option, how.option):
            if name in config:
                raise ArgumentError(f"--option {name} is given twice, or is a flag: say it once")
            config[name] = value
        with target(out, "retrieval", inputs=[self.path, how.test], overwrite=self.output.overwrite):
            return self._trained(config, out)

    def _trained(self, config: dict[str, Any], out: Path) -> int:
        how = self.train

        from ctrlib.retrieval.folder import save
        from ctrlib.retrieval.interactions import Interactions
        from ctrlib.retrieval.run import train
        from ctrlib.retrieval.table import build
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.record import KEY

        keep_freed_memory()
        build(config)  # refuses settings before the log is read
        log = Interactions.of(self._read(self.path))
        test = None if how.test is None else log.aligned(self._read(how.test))
        trained = train(
            log,
            config,
            test=test,
            select_on_test=how.select_on_test,
            valid_share=how.valid_share,
            metric=how.metric,
            ks=(self.lists.k,),
            over=self.lists.over,
            every=how.every,
            seed=how.seed,
            say=lambda line: print(line, file=sys.stderr),
        )
        trained.record[KEY]["data"] = str(self.path)
        save(trained, out)
        counts = {"log": log.counts, **({} if test is None else {"test": test.counts})}
        if self.json:
            print(json.dumps({**trained.record, **counts}))
            return 0
        _print_counts(counts)
        chosen = trained.record["best_epoch"]
        _print_metrics(
            {name: value for name, value in trained.record.items() if "@" in name and isinstance(value, float)},
            f"{how.method} on {self.path}, epoch {chosen} chosen on {trained.record['selected_on']}"
            if chosen
            else f"{how.method} on {self.path}",
        )
        print(
            fill(f"{out}: trained in {trained.record['seconds']:.1f} s; `ctrlib retrieve recommend {out}` makes lists")
        )
        return 0

    def _recommend(self) -> int:
        out = self.output.out
        assert out is not None
        with target(out, "file", inputs=[self.path, self.log], overwrite=self.output.overwrite):
            if out.suffix not in (".parquet", ".pq", ".parq"):
                raise ArgumentError(f"--out {out}: lists are written as parquet, so give a name that ends in .parquet")
            return self._listed(out)

    def _listed(self, out: Path) -> int:
        from ctrlib.retrieval.folder import load
        from ctrlib.retrieval.recommend import recommend, recommend_new, write

        trained = load(self.path)
        seen = not self.lists.with_seen
        if self.log is None:
            blocks = recommend(trained.method, trained.log, self.lists.k, exclude_seen=seen)
            counts = write(blocks, trained.log.users, trained.log.items, out)
        else:
            users, histories, odd = trained.log.histories(self._read(self.log))
            blocks = recommend_new(trained.method, histories, self.lists.k, exclude_seen=seen)
            counts = {**write(blocks, users, trained.log.items, out), **odd}
        if self.json:
            print(json.dumps(counts))
            return 0
        print(fill(f"{out}: {counts['rows']:,} items for {counts['users']:,} users"))
        if counts["short_lists"]:
            print(fill(f"  {counts['short_lists']:,} users have fewer than {self.lists.k}: no more are left for them"))
        if counts.get("unknown_items"):
            print(fill(f"  {counts['unknown_items']:,} items that training does not know were passed over"))
        return 0

    def _evaluate(self) -> int:
        assert self.log is not None
        from ctrlib.retrieval.folder import load
        from ctrlib.retrieval.run import evaluate_trained

        trained = load(self.path)
        test = trained.log.aligned(self._read(self.log))
        found = evaluate_trained(
            trained, test, select_on_test=self.train.select_on_test, ks=(self.lists.k,), over=self.lists.over
        )
        if self.json:
            print(json.dumps({**found, "test": test.counts}))
            return 0
        _print_counts({"test": test.counts})
        marked = ", which its epoch was selected on" if found["selected_on_this_log"] else ""
        _print_metrics(
            {name: value for name, value in found.items() if "@" in name}, f"{self.path} on {self.log}{marked}"
        )
        return 0


def _print_counts(counts: dict[str, dict[str, int]]) -> None:
    for name, some in counts.items():
        said = ", ".join(f"{number:,} {what.replace('_', ' ')}" for what, number in some.items() if number)
        print(fill(f"{name}: {said}"))


def _print_metrics(metrics: dict[str, float], title: str) -> None:
    if not metrics:
        return
    print(fill(title))
    table = new_table("", "", numbers=1)
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.5f}")
    show(table)
