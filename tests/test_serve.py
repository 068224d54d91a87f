"""A model behind HTTP: the numbers of `Predictor`, each to whom it belongs, and a refusal for all that is wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import ctrlib as ctr
from ctrlib import cli
from ctrlib.data.encoder import FEW_CELLS_OF_ROWS
from ctrlib.errors import ArgumentError
from ctrlib.export.folder import Exported, export_model
from ctrlib.manifest import write_manifest
from ctrlib.serving import requests
from ctrlib.serving.requests import Limits, described
from ctrlib.serving.scoring import Scorer
from ctrlib.serving.server import application, bind

LABELS = ("click", "buy")
LIMITS = Limits(rows=4_000, body=1 << 20)


def frame(rows: int, seed: int = 0) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    items = [f"i{n}" for n in range(20)]
    return pl.DataFrame(
        {
            "click": random.integers(0, 2, rows),
            "buy": random.integers(0, 2, rows),
            "user": random.integers(0, 30, rows),
            "item": random.choice(items, rows),
            "tags": ["|".join(random.choice(["a", "b", "c"], random.integers(1, 3))) for _ in range(rows)],
            "clicked": ["|".join(random.choice(items, random.integers(0, 5))) for _ in range(rows)],
            "price": random.random(rows) * 100,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two labels with every kind of column, whose weights are large enough that rows differ."""
    home = tmp_path_factory.mktemp("serve")
    features = [ctr.MultiValued("tags"), ctr.Sequence("clicked", vocabulary="item"), ctr.Numeric("price", "standard")]
    ctr.prepare(frame(400), home / "data", features=features, labels=list(LABELS), log=None)
    config = {"model": "shared_bottom", "embedding_dim": 4}
    torch.manual_seed(0)
    model = ctr.models.build(config, ctr.Schema.load(home / "data"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    ctr.save_model(model, config, home / "data", home / "model")
    return home / "model"


class Fragile(nn.Module):
    """A model that gives no score where the price is far beyond all others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> torch.Tensor:
        return self.model(batch).masked_fill(batch.dense[:, :1] > 1e30, torch.nan)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> ctr.Predictor:
    loaded = ctr.Predictor.load(folder)
    return ctr.Predictor(Fragile(loaded.model).eval(), loaded.schema, folder)


@pytest.fixture
def app(predictor: ctr.Predictor) -> Iterator[Any]:
    made = application(predictor, LIMITS)
    yield made
    made.state.service.close()


def rows(number: int, seed: int = 1) -> list[dict[str, Any]]:
    return frame(number, seed).drop(LABELS).to_dicts()


def client_of(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://model", timeout=60)


def asked(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def post(app: Any, path: str, body: bytes | Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return asked(app, "POST", path, content=content, headers=sent)


# What is answered.


@pytest.mark.parametrize("number", [1, 7, 100, 3_500])
def test_a_request_alone_gets_the_bits_of_the_predictor(app: Any, predictor: ctr.Predictor, number: int) -> None:
    given = rows(number)
    given[0] |= {"user": 10_000, "item": None, "page": "front"}
    expected, counts = predictor.predict(given)
    answer = post(app, "/predict", {"rows": given})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"predictions": expected.to_dict(as_series=False), "counts": counts}
    assert answer.json()["counts"]["unseen"]["user"] == answer.json()["counts"]["missing"]["item"] == 1
    assert answer.json()["counts"]["ignored"] == ["page"]


def test_rank_is_that_of_the_predictor(app: Any, predictor: ctr.Predictor) -> None:
    context = {"user": 7, "clicked": "i1|i2|unheard", "page": "front"}
    items = frame(1_000, 2).select("item", "tags", "price").to_dicts()
    for given in ({}, {"k": None}, {"k": 10}, {"k": 10, "by": "buy"}, {"k": 5_000}):
        expected = predictor.rank(context, items, **given)  # type: ignore[arg-type]
        answer = post(app, "/rank", {"context": context, "items": items, **given}).json()
        assert answer["rows"] == expected["row"].to_list()
        assert answer["predictions"] == expected.drop("row").to_dict(as_series=False)


def test_requests_of_one_batch_get_their_own_answers(predictor: ctr.Predictor) -> None:
    """200 at once, of distinct rows; every tenth is bad, one way or another, and harms nobody."""
    given = [rows(1 + place % 5, seed=100 + place) for place in range(200)]
    for place in range(0, 200, 10):
        given[place][-1]["price"] = "dear" if place % 20 else 3e38  # no number; so large that the model gives no score
    expected = [None if place % 10 == 0 else predictor.predict(one)[0] for place, one in enumerate(given)]

    app = application(predictor, Limits(waiting=200))
    scorer, entered, go = app.state.service.scorer, threading.Event(), threading.Event()

    def answer_late(found: Any) -> dict[str, Any]:
        entered.set()
        return {"done": go.wait(60)}

    def blocking(*_: Any) -> Any:  # what calls the model, when it has called it for this one
        return requests.Asked(predictor.encode(rows(1))[0], "rows", answer_late)

    async def ask() -> list[httpx.Response]:
        async with client_of(app) as client:
            scorer.submit(blocking, b"")
            assert entered.wait(60)
            tasks = [asyncio.create_task(client.post("/predict", json={"rows": one})) for one in given]
            while scorer.waiting < 190 or not all(task.done() for task in tasks[10::20]):
                await asyncio.sleep(0.01)  # ten cannot be read, and wait for nobody
            go.set()
            return list(await asyncio.gather(*tasks))

    answers = asyncio.run(ask())
    app.state.service.close()
    for place, (answer, one, right) in enumerate(zip(answers, given, expected)):
        if right is None:
            assert answer.status_code == 400
            assert re.search(f"^rows: .*row {len(one)}", answer.json()["error"])
        else:
            assert answer.status_code == 200, place
            for name in LABELS:
                np.testing.assert_allclose(answer.json()["predictions"][name], right[name], rtol=0, atol=1e-6)
    assert scorer.calls < 60  # with the halves in which the ten without a score are looked for


def test_what_waits_is_scored_in_one_call(predictor: ctr.Predictor) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(predictor: ctr.Predictor, body: bytes, limits: Limits) -> requests.Asked:
        asked = requests.predict(predictor, body, limits)

        def answer(found: Any) -> dict[str, Any]:
            entered.set()
            assert go.wait(60)
            return asked.answer(found)

        return dataclasses.replace(asked, answer=answer)

    scorer = Scorer(predictor, LIMITS)
    bodies = [json.dumps({"rows": rows(3, seed)}).encode() for seed in range(9)]
    first = scorer.submit(slow, bodies[0])
    assert entered.wait(60)
    others = [scorer.submit(requests.predict, body) for body in bodies[1:]]
    assert others[3].cancel()  # whose client has gone
    ranked = scorer.submit(
        requests.rank, json.dumps({"context": {"user": 1, "clicked": ""}, "items": rows(4)}).encode()
    )
    with pytest.raises(requests.RefusedError, match=r"columns \['clicked', 'user'\] are in the context and in the"):
        ranked.result(60)  # which was read after all others
    go.set()
    first.result(60)
    scorer.close()
    assert (scorer.calls, scorer.rows) == (2, 3 + 7 * 3)
    for seed, answer in enumerate(others, 1):
        if not answer.cancelled():
            expected = predictor.predict(rows(3, seed))[0]["click"]
            np.testing.assert_allclose(json.loads(answer.result(60))["predictions"]["click"], expected, atol=1e-6)


def test_whole_numbers_may_stand_beside_others_in_requests_of_any_size(app: Any) -> None:
    """JSON's writers drop the `.0` of a number."""
    given = rows(FEW_CELLS_OF_ROWS // 5 + 1)
    given[5]["price"], given[6]["price"] = 3, 4.0
    answer = post(app, "/predict", {"rows": given}).json()
    assert len(answer["predictions"]["click"]) == len(given)
    given[5]["price"], given[6]["price"] = 3.0, 4
    assert post(app, "/predict", {"rows": given}).json() == answer
    few = post(app, "/predict", {"rows": given[:7]}).json()
    np.testing.assert_allclose(few["predictions"]["click"], answer["predictions"]["click"][:7], rtol=0, atol=1e-6)


def test_items_may_be_named_by_their_keys(predictor: ctr.Predictor) -> None:
    items = frame(200, 2).select("item", "tags", "price").with_columns(sku=pl.format("s{}", pl.int_range(200)))
    made = application(predictor, LIMITS, predictor.items(items, "sku"))
    context = {"user": 7, "clicked": "i1|i2|unheard"}
    try:
        keys = items["sku"].to_list()[::-1]
        found = post(made, "/rank", {"context": context, "items": keys, "k": 10}).json()
        assert found == post(made, "/rank", {"context": context, "items": items[::-1].to_dicts(), "k": 10}).json()
        for given, status, message in (
            (["s1", "s1000"], 400, "there is no item of key 's1000' among the 200"),
            ([*keys, "s1", {"item": "i1"}], 400, "items: row 1 is str 's199': expected an object of cells"),
            ([], 400, "items has no rows"),
            (["s1"] * (LIMITS.rows + 1), 413, "items has 4,001 rows"),
            ([True], 400, "items: row 1 is bool True"),
        ):
            answer = post(made, "/rank", {"context": context, "items": given})
            assert answer.status_code == status and message in answer.json()["error"]
    finally:
        made.state.service.close()


def test_an_export_is_served_as_its_model_is(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = ctr.Predictor.load(folder)
    export_model(folder, tmp_path / "onnx", to="onnx")
    exported = Exported(tmp_path / "onnx").predictor()
    made = application(exported, LIMITS)
    try:
        for number in (1, 100):
            given = rows(number)
            given[0] |= {"user": 10_000, "item": None, "tags": "", "clicked": "", "page": "front"}
            expected, counts = loaded.predict(given)
            answer = post(made, "/predict", {"rows": given}).json()
            assert answer["counts"] == counts
            for label in LABELS:
                np.testing.assert_allclose(answer["predictions"][label], expected[label], rtol=0, atol=1e-6)
        context, items = {"user": 7, "clicked": ["i1", "i2"]}, frame(50, 2).select("item", "tags", "price")
        ranked = post(made, "/rank", {"context": context, "items": items.to_dicts(), "k": 5, "by": "buy"}).json()
        best = loaded.rank(context, items, 5, by="buy")
        assert ranked["rows"] == best["row"].to_list()
        np.testing.assert_allclose(ranked["predictions"]["buy"], best["buy"], rtol=0, atol=1e-6)
        assert asked(made, "GET", "/model").json() == described(loaded, LIMITS)
        bad = post(made, "/predict", {"rows": [{**rows(1)[0], "price": "dear"}]})
        assert bad.status_code == 400 and "row 1, column 'price'" in bad.json()["error"]
    finally:
        made.state.service.close()
    # Code is run only where that is said.
    about = json.loads((tmp_path / "onnx/export.json").read_text())
    (tmp_path / "onnx/export.json").write_text(json.dumps({**about, "format": "pt2"}))
    write_manifest(tmp_path / "onnx", "export")
    assert cli.main(["serve", str(tmp_path / "onnx"), "--port", "0"]) == 1
    assert "holds a program of torch's" in (said := capsys.readouterr().err) and "--trust" in said
    # Of an older version, which lacks what columns are encoded with.
    (tmp_path / "onnx/export.json").write_text(json.dumps(about))
    (tmp_path / "onnx/schema.json").unlink()
    write_manifest(tmp_path / "onnx", "export")
    with pytest.raises(ctr.SchemaError, match=r"has no schema\.json, an older ctrlib wrote it"):
        Exported(tmp_path / "onnx").predictor()


def test_what_there_is(app: Any, predictor: ctr.Predictor) -> None:
    answer = asked(app, "GET", "/model")
    assert answer.json() == {
        "labels": ["click", "buy"],
        "columns": [
            {"name": "tags", "kind": "multi_valued"},
            {"name": "clicked", "kind": "sequence"},
            {"name": "price", "kind": "numeric"},
            {"name": "user", "kind": "categorical"},
            {"name": "item", "kind": "categorical"},
        ],
        "schema_hash": predictor.schema.hash,
        "max_rows": 4_000,
    }
    assert asked(app, "GET", "/").json() == answer.json()
    assert asked(app, "HEAD", "/model").content == b""


def test_health_tells_of_the_end(app: Any) -> None:
    answer = asked(app, "GET", "/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    app.state.service.draining = True
    answer = asked(app, "GET", "/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
    assert post(app, "/predict", {"rows": rows(1)}).status_code == 200  # on a connection that is there


def test_metrics_count(app: Any, predictor: ctr.Predictor) -> None:
    for number in (3, 4):
        post(app, "/predict", {"rows": rows(number)})
    post(app, "/predict", b"{")
    post(app, "/rank", {"context": {}, "items": rows(5), "k": 1})
    asked(app, "GET", "/nothing")
    answer = asked(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert [line for line in lines if line.startswith("ctrlib_requests_total")] == [
        'ctrlib_requests_total{path="/predict",status="200"} 2',
        'ctrlib_requests_total{path="/predict",status="400"} 1',
        'ctrlib_requests_total{path="/rank",status="200"} 1',
        'ctrlib_requests_total{path="other",status="404"} 1',
    ]
    assert {"ctrlib_rows_total 12", "ctrlib_model_calls_total 3", "ctrlib_requests_waiting 0"} <= set(lines)
    assert f'ctrlib_model_info{{schema_hash="{predictor.schema.hash}"}} 1' in lines
    bars = [int(line.split()[1]) for line in lines if line.startswith('ctrlib_request_seconds_bucket{path="/predict"')]
    assert bars == sorted(bars) and len(bars) == 14 and bars[-1] == 3
    assert 'ctrlib_request_seconds_count{path="/predict"} 3' in lines
    # Each line is a remark or a sample, as the format has it.
    sample = r'ctrlib_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [\d.e+-]+'
    assert [line for line in lines if not re.fullmatch(rf"# (HELP|TYPE) ctrlib_\w+ .+|{sample}", line)] == []


# What is refused.

ROW = rows(1)[0]


def changed(**cells: Any) -> bytes:
    return json.dumps({"rows": [ROW, {**ROW, **cells}]}).encode()


BAD = {
    "nothing": (b"", 400, "the body is no JSON: Expecting value"),
    "half": (b'{"rows": [', 400, "the body is no JSON: Expecting value: line 1 column 11"),
    "two": (b'{"rows": []} {}', 400, "the body is no JSON: Extra data"),
    "other bytes": (b"\xff\xfe{}", 400, r"the body is not UTF-8 \(byte 0\)"),
    "mark of order": (b"\xef\xbb\xbf{}", 400, "the body is no JSON: Unexpected UTF-8 BOM"),
    "a list": (b"[]", 400, r"the body is list \[\]: expected an object with rows"),
    "a text": (b'"rows"', 400, "the body is str 'rows': expected an object with rows"),
    "null": (b"null", 400, "the body is None: expected"),
    "no rows": (b"{}", 400, "the body lacks 'rows'"),
    "another name": (b'{"rows": [], "row": 1}', 400, "the body has 'row', which is not known: the closest are rows"),
    "empty": (b'{"rows": []}', 400, "rows has no rows: expected at least one"),
    "one row": (b'{"rows": {"user": 1}}', 400, r"rows is dict \{'user': 1\}: expected a list of objects"),
    "lists": (b'{"rows": [[1, 2]]}', 400, r"rows: row 1 is list \[1, 2\]: expected an object of cells"),
    "null row": (b'{"rows": [null]}', 400, "rows: row 1 is None: expected an object of cells"),
    "a column is missing": (json.dumps({"rows": [{"user": 1}]}).encode(), 400, "'item'"),
    "NaN": (b'{"rows": [{"price": NaN}]}', 400, "the body holds NaN, which JSON has not: give null"),
    "Infinity": (b'{"rows": [{"price": Infinity}]}', 400, "the body holds Infinity"),
    "-Infinity": (b'{"rows": [{"price": -Infinity}]}', 400, "the body holds -Infinity"),
    "1e400": (b'{"rows": [{"price": 1e400}]}', 400, "rows: row 1, column 'price' holds a number that is too large"),
    "1e400 in a list": (b'{"rows": [{"clicked": [1e400]}]}', 400, "row 1, column 'clicked' holds a number that is too"),
    "beyond float32": (changed(price=1e300), 400, "rows: row 2.*column 'price'"),
    "65 bits": (changed(user=2**63), 400, "rows: row 2, column 'user' holds a whole number beyond 64 bits"),
    "many digits": (b'{"rows": [{"user": ' + b"9" * 5000 + b"}]}", 400, "a whole number of thousands of digits"),
    "deep": (b'{"rows": ' + b"[" * 100_000, 400, "nested too deeply"),
    "deep objects": (b'{"a": ' * 100_000, 400, "nested too deeply"),
    "an object": (changed(user={"id": 1}), 400, "rows: row 2, column 'user' holds an object: expected"),
    "in a list": (changed(tags=["a", {"b": 1}]), 400, "rows: row 2, column 'tags' holds an object"),
    "list of lists": (changed(tags=[["a"]]), 400, "rows: row 2, column 'tags' holds a list within a list"),
    "a list for one id": (changed(user=[1, 2]), 400, "column 'user'"),
    "half a pair": (b'{"rows": [{"item": "\\ud83d"}]}', 400, "half a surrogate pair"),
    "no number": (
        changed(price="dear"),
        400,
        "rows: column 'price' holds cells of several types, str 'dear' in row 2 and float",
    ),
    "text for a number": (json.dumps({"rows": [{**ROW, "user": "u1"}]}).encode(), 400, "column 'user'"),
    "true for a number": (changed(user=True), 400, "column 'user'"),
    "too many": (json.dumps({"rows": [{}] * 4001}).encode(), 413, "rows has 4,001 rows, and this server takes 4,000"),
    "too long": (b" " * ((1 << 20) + 1), 413, "the body has more than 1,048,576 bytes: send rows in several"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_and_harms_nothing(app: Any, name: str, caplog: Any) -> None:
    body, status, message = BAD[name]
    answer = post(app, "/predict", body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert re.search(message, answer.json()["error"]), answer.json()["error"]
    assert "Traceback" not in answer.text and caplog.text == ""
    assert post(app, "/predict", {"rows": [ROW]}).status_code == 200


BAD_RANKS = {
    "no context": ({"items": [ROW]}, 400, "the body lacks 'context'"),
    "context is a list": ({"context": [1], "items": [ROW]}, 400, r"context is list \[1\]: expected an object of cells"),
    "object in the context": ({"context": {"user": {}}, "items": [ROW]}, 400, "context, column 'user' holds an object"),
    "no items": ({"context": ROW, "items": []}, 400, "items has no rows: expected at least one"),
    "items are an object": ({"context": {}, "items": ROW}, 400, "items is dict .*: expected a list of objects"),
    "on both sides": ({"context": ROW, "items": [ROW]}, 400, "are in the context and in the items"),
    "on neither": ({"context": {}, "items": [{"item": "i1"}]}, 400, "are neither in the context nor in the items"),
    "k is 0": ({"context": {}, "items": [ROW], "k": 0}, 400, "k is int 0: expected a whole number from 1 on"),
    "k is a text": ({"context": {}, "items": [ROW], "k": "3"}, 400, "k is str '3': expected a whole number"),
    "k is true": ({"context": {}, "items": [ROW], "k": True}, 400, "k is bool True: expected a whole number"),
    "no such label": ({"context": {}, "items": [ROW], "by": "clik"}, 400, "by='clik' is no label; the closest are"),
    "by is a list": ({"context": {}, "items": [ROW], "by": ["buy"]}, 400, r"by is list \['buy'\]: expected the name"),
    "a bad item": (
        {"context": {}, "items": [ROW, {**ROW, "price": "x"}]},
        400,
        "items: column 'price' holds cells of several types, str 'x' in row 2 and float",
    ),
    "too many": ({"context": {}, "items": [{}] * 4001}, 413, "items has 4,001 rows"),
    "too far": (
        {"context": {}, "items": [ROW, {**ROW, "price": 3e38}]},
        400,
        "items: row 2: the model gives .*no score",
    ),
}


@pytest.mark.parametrize("name", BAD_RANKS)
def test_a_bad_ranking_is_refused(app: Any, name: str) -> None:
    body, status, message = BAD_RANKS[name]
    answer = post(app, "/rank", body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert re.search(message, answer.json()["error"]), answer.json()["error"]


def test_other_paths_methods_and_contents(app: Any) -> None:
    body = json.dumps({"rows": [ROW]}).encode()
    for method, path, status in (
        ("GET", "/predict", 405),
        ("PUT", "/rank", 405),
        ("POST", "/health", 405),
        ("DELETE", "/", 405),
        ("GET", "/predict/", 404),
        ("GET", "/../etc/passwd", 404),
        ("POST", "/Predict", 404),
    ):
        answer = asked(app, method, path, content=body)
        assert (answer.status_code, list(answer.json())) == (status, ["error"]), path
        assert "there are POST /predict and /rank" in answer.json()["error"]
    assert asked(app, "GET", "/predict").headers["allow"] == "POST"
    for headers in ({"content_type": "text/plain"}, {"content_type": "application/x-www-form-urlencoded"}):
        answer = post(app, "/predict", body, **headers)
        assert (answer.status_code, "send Content-Type: application/json" in answer.text) == (415, True)
    assert "is coded (gzip)" in post(app, "/predict", body, content_encoding="gzip").json()["error"]
    assert post(app, "/predict", body, content_type="Application/JSON; charset=utf-8").status_code == 200


def test_a_body_is_counted_as_it_comes(app: Any) -> None:
    sent = []

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            sent.append(1)
            yield b" " * 65_536

    answer = asked(app, "POST", "/predict", content=pieces(), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"][:14]) == (413, "the body has m")
    service = app.state.service
    assert service._held == 0
    service.limits = Limits(held=1)
    answer = post(app, "/predict", {"rows": [ROW]})
    assert (answer.status_code, answer.headers["retry-after"], service._held) == (503, "1", 0)


def test_a_slow_client_is_refused(app: Any) -> None:
    async def ask() -> httpx.Response:
        async def never() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(60)

        async with client_of(app) as client:
            return await client.post("/predict", content=never(), headers={"content-type": "application/json"})

    app.state.service.limits = Limits(seconds=1)
    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]) == (408, "the body did not come within 1 seconds")


def test_a_full_queue_is_said(predictor: ctr.Predictor) -> None:
    app = application(predictor, Limits(waiting=2))
    scorer, go, entered = app.state.service.scorer, threading.Event(), threading.Event()

    def blocking(*_: Any) -> Any:
        entered.set()
        go.wait(60)
        raise ArgumentError("done")

    scorer.submit(blocking, b"")
    assert entered.wait(60)

    async def ask() -> list[httpx.Response]:
        async with client_of(app) as client:
            tasks = [asyncio.create_task(client.post("/predict", json={"rows": [ROW]})) for _ in range(3)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1
            assert (await client.get("/health")).status_code == 200  # which waits for nobody
            assert "ctrlib_requests_waiting 2" in (await client.get("/metrics")).text
            go.set()
            return list(await asyncio.gather(*tasks))

    answers = sorted(asyncio.run(ask()), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200, 200, 503]
    assert answers[-1].headers["retry-after"] == "1"
    assert answers[-1].json() == {"error": "2 requests wait already: ask again in a second"}
    app.state.service.close()


class PanicException(BaseException):
    """As polars' own faults, which are no Exception."""


@pytest.mark.parametrize("kind", [KeyError, PanicException, MemoryError])
@pytest.mark.parametrize("where", ["encode", "score_encoded"])
def test_a_fault_is_told_without_a_traceback_and_stays_alone(
    app: Any, where: str, kind: type, monkeypatch: Any, caplog: Any
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise kind("secret")

    with monkeypatch.context() as patch:
        patch.setattr(ctr.Predictor, where, failing)
        answer = post(app, "/predict", {"rows": [ROW]})
    said = f"the server failed at this request ({kind.__name__}); its log says more"
    assert (answer.status_code, answer.json()) == (500, {"error": said})
    assert "secret" in caplog.text and "Traceback" in caplog.text  # for whoever runs it
    assert post(app, "/predict", {"rows": [ROW]}).status_code == 200


# The command.


def test_wrong_flags_and_places_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    for line, message in (
        (f"serve {folder} --port {port}", f"port {port} of 127.0.0.1 cannot be had (Address already in use)"),
        (f"serve {folder} --port 70000", "port (--port) must be below 65536, got 70000"),
        (f"serve {folder} --host no.such.host.invalid", "port 8000 of no.such.host.invalid cannot be had"),
        (f"serve {folder} --port -1", "port (--port) must be 0 or more, got -1"),
        (f"serve {folder} --grace 0", "grace (--grace) must be 1 or more, got 0"),
        (f"serve {folder} --max-rows 0", "max_rows (--max-rows) must be 1 or more, got 0"),
        (f"serve {folder} --threads 0", "threads (--threads) must be 1 or more, got 0"),
        (f"serve {folder.parent / 'data'}", "is not a model folder, it has no model.json"),
        (f"serve {folder} --items items.csv", "--items and --item-key go together"),
        (f"serve {folder} --items no.csv --item-key sku", "no.csv does not exist"),
    ):
        assert cli.main(line.split()) == 1
        printed, said = capsys.readouterr()
        assert printed == "" and message in said and "Traceback" not in said
    taken.close()


def test_it_says_what_to_install(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "ctrlib.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(folder)]) == 1
    assert "pip install 'ctrlib[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end(folder: Path, predictor: ctr.Predictor, ending: signal.Signals) -> None:
    """One is being sent when the signal comes: it is answered, nobody else is, and the exit status is 0."""
    command = [sys.executable, "-m", "ctrlib.cli", "serve", str(folder), "--port", "0", "--json", "--grace", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert said["schema_hash"] == predictor.schema.hash
            url = httpx.URL(said["url"])
            given = rows(50)

            async def ask() -> bytes:
                body = json.dumps({"rows": given}).encode()
                head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                reader, writer = await asyncio.open_connection(url.host, url.port)
                idle, beside = await asyncio.open_connection(url.host, url.port)  # which must not hold it up
                writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body[:100])
                await writer.drain()
                await asyncio.sleep(0.5)
                process.send_signal(ending)
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:  # until nobody is let in
                    try:
                        _, other = await asyncio.open_connection(url.host, url.port)
                        other.close()
                        await other.wait_closed()
                        await asyncio.sleep(0.05)
                    except OSError:
                        break
                else:
                    raise AssertionError("it still takes connections")
                writer.write(body[100:])
                answer = await reader.read()
                assert await idle.read() == b""
                for one in (writer, beside):
                    one.close()
                    await one.wait_closed()
                return answer

            answer = asyncio.run(ask())
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            expected = predictor.predict(given)[0]
            np.testing.assert_allclose(json.loads(body)["predictions"]["click"], expected["click"], rtol=0, atol=1e-6)
            assert process.wait(30) == 0
            assert process.stdout.read() == ""
            assert process.stderr is not None and "Traceback" not in process.stderr.read()
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
