"""How soon `ctrlib serve` answers under load, in an open loop: requests are sent when they are due, answered or not.

    python tests/benchmarks/serve_load.py --rate 200 --seconds 30

DCN V2 over 10 ids of 100,000 values each, in a process of its own beside this one, on loopback. The time of a request
counts from when it was due, so that a server that stands still is not spared those that wait meanwhile. Then 1,000
candidates of one user through /rank, one request after another: sent as rows, then by the keys of a file of items.
`--export onnx` serves an export of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import polars as pl
import tyro
from serving_speed import FIELDS, model_folder

from ctrlib.export.folder import export_model

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
IDLE = 2.0  # seconds after which a connection is not used again: uvicorn closes it after 5


@dataclass(frozen=True)
class Arguments:
    """What to send."""

    rate: float = 200
    """Requests a second."""
    seconds: float = 30
    """How long."""
    rows: int = 100
    """Rows of a request."""
    values: int = 100_000
    """Values of each vocabulary."""
    candidates: int = 1_000
    """Candidates of a request to /rank."""
    ranks: int = 200
    """Requests to /rank."""
    hidden: tuple[int, ...] = (400, 400, 400)
    """Hidden layers of the model."""
    threads: int = 1
    """Threads of the server's model."""
    export: str | None = None
    """Serve the model exported to this format, such as onnx."""
    home: Path | None = None
    """Folder in which the model is kept for the next time."""


class Client:
    """Connections that are kept, each for one request at a time; httpx would cost more than the server."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.free: list[tuple[float, Connection]] = []  # since when

    async def post(self, path: str, body: bytes) -> int:
        """The status of the answer, which is read to its end."""
        while self.free and self.free[0][0] < time.perf_counter() - IDLE:
            self.free.pop(0)[1][1].close()
        reader, writer = self.free.pop()[1] if self.free else await asyncio.open_connection(self.host, self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: model\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        answered = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answered.split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        self.free.append((time.perf_counter(), (reader, writer)))
        return int(answered.split(b" ", 2)[1])

    def close(self) -> None:
        for _, (_, writer) in self.free:
            writer.close()


def bodies_of(arguments: Arguments) -> list[bytes]:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(50):
        ids = rng.integers(0, arguments.values, (arguments.rows, FIELDS)) * 7919 + np.arange(FIELDS)
        rows = [{f"c{n}": one for n, one in enumerate(row)} for row in ids.tolist()]
        found.append(json.dumps({"rows": rows}).encode())
    return found


def report(what: str, taken: list[float], statuses: list[int]) -> None:
    p50, p99, most = (1000 * np.percentile(taken, part) for part in (50, 99, 100))
    wrong = sum(status != 200 for status in statuses)
    load = os.getloadavg()[0]
    print(
        f"{what}: {len(statuses)} answers, {wrong} of them errors, p50 {p50:.1f} ms, p99 {p99:.1f} ms, at most "
        f"{most:.1f} ms; load average {load:.1f} on {os.cpu_count()} cores"
    )


def processor_seconds(process: int) -> float:
    """Of all threads of a process, up to now (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def open_loop(client: Client, arguments: Arguments, server: int) -> None:
    bodies, taken, statuses = bodies_of(arguments), [], []

    async def one(due: float, body: bytes) -> None:
        statuses.append(await client.post("/predict", body))
        taken.append(time.perf_counter() - due)

    for body in bodies:  # connections and caches
        await client.post("/predict", body)
    ours, theirs = time.process_time(), processor_seconds(server)
    began, tasks = time.perf_counter(), []
    for number in range(int(arguments.rate * arguments.seconds)):
        due = began + number / arguments.rate
        await asyncio.sleep(max(0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due, bodies[number % len(bodies)])))
    await asyncio.gather(*tasks)
    report(f"{arguments.rate:g} requests of {arguments.rows} rows a second", taken, statuses)
    used = [1000 * some / len(tasks) for some in (processor_seconds(server) - theirs, time.process_time() - ours)]
    print(f"  processor's time of a request: {used[0]:.1f} ms in the server, {used[1]:.1f} ms here")


def items_of(arguments: Arguments) -> pl.DataFrame:
    """Items by their keys, with the second half of the fields."""
    ids = np.random.default_rng(3).integers(0, arguments.values, (arguments.values, FIELDS)) * 7919 + np.arange(FIELDS)
    columns = {f"c{n}": ids[:, n] for n in range(FIELDS // 2, FIELDS)}
    return pl.DataFrame({"sku": np.arange(arguments.values), **columns})


async def one_after_another(client: Client, arguments: Arguments, *, by_keys: bool) -> None:
    rng = np.random.default_rng(2)
    half = FIELDS // 2
    taken, statuses = [], []
    for number in range(arguments.ranks + 20):
        ids = rng.integers(0, arguments.values, (arguments.candidates, FIELDS)) * 7919 + np.arange(FIELDS)
        context = {f"c{n}": int(ids[0, n]) for n in range(half)}
        items: list[Any] = [{f"c{n}": int(row[n]) for n in range(half, FIELDS)} for row in ids]
        if by_keys:
            items = rng.integers(0, arguments.values, arguments.candidates).tolist()
        body = json.dumps({"context": context, "items": items, "k": 10}).encode()
        started = time.perf_counter()
        status = await client.post("/rank", body)
        if number >= 20:
            taken.append(time.perf_counter() - started)
            statuses.append(status)
    report(f"{arguments.candidates:,} candidates of one user{', by keys' if by_keys else ''}", taken, statuses)


def main(arguments: Arguments) -> None:
    """Serve, load, stop."""
    with tempfile.TemporaryDirectory() as name:
        home = arguments.home or Path(name)
        served = home / "model"
        if not served.exists():
            model_folder(home, arguments.values, hidden=list(arguments.hidden))
        if arguments.export is not None:
            served = home / arguments.export
            if not served.exists():
                export_model(home / "model", served, to=arguments.export)
        command = [sys.executable, "-m", "ctrlib.cli", "serve", str(served), "--port", "0", "--json", "--trust"]
        items_of(arguments).write_csv(home / "items.csv")
        command += ["--threads", str(arguments.threads), "--items", str(home / "items.csv"), "--item-key", "sku"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                address = urlsplit(json.loads(server.stdout.readline())["url"])

                async def load() -> None:
                    client = Client(str(address.hostname), int(address.port or 0))
                    await open_loop(client, arguments, server.pid)
                    for by_keys in (False, True):
                        await one_after_another(client, arguments, by_keys=by_keys)
                    client.close()

                asyncio.run(load())
            finally:
                server.terminate()
        print(f"exit status of the server: {server.returncode}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
