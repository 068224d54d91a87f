"""`ctrlib export`: a model folder as a program that other processes and languages run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import Switch
from ctrlib.cli.paths import check_model


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: Path
    """Folder to write: the program, how raw cells become its inputs, and a reader of cells that needs numpy alone."""
    to: Literal["pt2", "aoti", "onnx", "ort-int8"] = "onnx"
    """Its form: torch.export's program, compiled machine code (needs a C++ compiler), ONNX, or ONNX with matrices in
    8-bit integers."""
    overwrite: Switch = False
    """Replace the export in --out if there is one."""


@dataclass(frozen=True)
class Export(Command):
    """Write a trained model as a program that runs without ctrlib.

    Printed is the largest difference between a logit of the file, as read back from disk, and of the trained model, for
    batches of 1, 16 and 1,000 rows with unseen ids and empty bags among them. The program gives logits; the folder's
    reader.py makes probabilities of them.

    Example:

        ctrlib export runs/clicks --to onnx --out exported/clicks
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` or `ctrlib compress` writes it."""
    output: Output

    def __call__(self) -> int:
        """Run the command; the exit status."""
        check_model(self.model)
        from ctrlib.export.folder import export_model

        found = export_model(self.model, self.output.out, to=self.output.to, overwrite=self.output.overwrite)
        if self.json:
            print(json.dumps({"out": str(self.output.out), **found}))
            return 0
        parity = found["parity"]
        rows = ", ".join(f"{difference:.1e} for {rows} rows" for rows, difference in parity["rows"].items())
        print(f"{found['bytes']:,} bytes in {self.output.out / found['file']}")
        print(f"largest difference of a logit from the trained model's: {rows}")
        if found["row_error"] is not None:
            print(f"largest relative error of a row, by compression: {found['row_error']:.1e}")
        return 0
