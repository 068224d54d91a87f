"""`ctrlib update`: events that have happened, for a model whose histories and rates are made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import Paths, shown
from ctrlib.cli.paths import check_model, check_raw


@dataclass(frozen=True)
class Update(Command):
    """Add new events to those that a model's columns are made of.

    For models of data that was prepared with --history or --rate. The weights stay; rows that `ctrlib predict` scores
    from then on are told of these events, too. Events come in the order of time, each once.

    Example:

        ctrlib update runs/log yesterday.csv
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Annotated[Positional[Paths], shown("DATA ...")]
    """Raw files with the events and their labels, as `ctrlib prepare` takes them."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What to do about damaged rows: stop and name the first, or leave them out and count them."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        check_model(self.model)
        for path in self.data:
            check_raw(path)
        from ctrlib.serving.update import update

        data = self.data[0] if len(self.data) == 1 else list(self.data)
        found = update(self.model, data, on_bad_row=self.on_bad_row)
        if self.json:
            print(json.dumps({"model": str(self.model), **found}))
            return 0
        print(f"{found['events']:,} events, {found['positives']:,} of them positive, added to {self.model}")
        for reason, count in found["skipped"].items():
            print(f"  {count:,} rows left out: {reason}")
        return 0
