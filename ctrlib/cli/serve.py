"""`ctrlib serve`: a trained model behind HTTP."""

from __future__ import annotations

import ipaddress
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import OptionalName, OptionalPath, Switch
from ctrlib.cli.paths import check_model, check_raw
from ctrlib.errors import ArgumentError, MissingPackageError, check_whole


@dataclass(frozen=True)
class Listening:
    """Where it is reached, and how it ends."""

    host: str = "127.0.0.1"
    """Address to listen at; by default only this machine reaches it."""
    port: int = 8000
    """Port to listen at; 0 is any that is free, which is printed."""
    grace: int = 20
    """Seconds that requests at work have after SIGTERM; then they are cut off."""


@dataclass(frozen=True)
class Catalogue:
    """Items that requests to /rank may name by their keys, encoded once at the start."""

    items: OptionalPath = None
    """File of them, with the columns of the model that depend on the item only."""
    item_key: OptionalName = None
    """Column of it that names an item."""


@dataclass(frozen=True)
class Load:
    """How much it takes."""

    max_rows: int = 10_000
    """Rows, or candidates, of one request; more are refused."""
    threads: int = 1
    """Threads of a call of the model; more than one pays for thousands of rows a request."""


@dataclass(frozen=True)
class Serve(Command):
    """Serve a trained or exported model's probabilities over HTTP.

    POST /predict takes {"rows": [{"COLUMN": CELL, ...}, ...]}, POST /rank the candidates of one user. GET /model,
    /health and /metrics say what there is. SIGTERM and Ctrl-C end it when the requests at work are answered. It knows
    no TLS and no passwords: put it behind a proxy. It needs Starlette and uvicorn: pip install 'ctrlib[serve]'.

    Example:

        ctrlib serve runs/clicks --port 8000
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` or `ctrlib compress` writes it; or a folder of `ctrlib export`."""
    trust: Switch = False
    """Run an export that is code (pt2, aoti): whoever wrote it decides what it does."""
    listening: Listening = field(default_factory=Listening)
    catalogue: Catalogue = field(default_factory=Catalogue)
    load: Load = field(default_factory=Load)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        is_export = (self.model / "export.json").is_file()
        if not is_export:
            check_model(self.model)
        host, port, grace = self.listening.host, self.listening.port, self.listening.grace
        check_whole(0, port=port)
        items, key = self.catalogue.items, self.catalogue.item_key
        if (items is None) != (key is None):
            raise ArgumentError("--items and --item-key go together: a file of items, and its column of their keys")
        if items is not None:
            check_raw(items)
        check_whole(1, grace=grace, max_rows=self.load.max_rows, threads=self.load.threads)
        try:
            from ctrlib.serving.server import bind, serve
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
                raise
            raise MissingPackageError(f"the server is not installed ({error}): pip install 'ctrlib[serve]'") from error
        import torch

        from ctrlib.serving.predictor import Predictor
        from ctrlib.serving.requests import Limits

        with bind(host, port) as bound:
            url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
            torch.set_num_threads(self.load.threads)
            if is_export:
                from ctrlib.export.folder import Exported

                predictor: Predictor = Exported(self.model, trust=self.trust).predictor()
            else:
                predictor = Predictor.load(self.model)
            known = None if items is None or key is None else predictor.items(items, key)
            if not _is_loopback(host):
                print(
                    f"{host} may be reached by others, and nobody is asked for a password", file=sys.stderr, flush=True
                )

            def started() -> None:
                found = {"url": url, "model": str(self.model), "schema_hash": predictor.schema.hash}
                print(json.dumps(found) if self.json else f"{self.model} is served at {url}", flush=True)

            serve(predictor, bound, Limits(rows=self.load.max_rows), items=known, grace=grace, started=started)
        return 0


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> [_is_loopback(host) for host in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "server.example")]
    [True, True, True, False, False]
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
