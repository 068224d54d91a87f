"""`ctrlib doctor`: what is wrong with this installation."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlib.cli.flags import Command


@dataclass(frozen=True)
class Doctor(Command):
    """Check this installation; print what repairs it.

    It says which versions of Python, torch, TorchRec and fbgemm are here, whether they go together, and whether
    TorchRec computes. What is wrong comes with the exact command that repairs it.
    """

    def __call__(self) -> int:
        """Run the command; the exit status."""
        from ctrlib.doctor import main

        return main(json=self.json)
