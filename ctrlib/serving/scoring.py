"""One thread that scores for all requests of a server: whatever waits is put together into one call of the model."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import polars as pl

from ctrlib.errors import CtrlibError
from ctrlib.serving.predictor import Predictor
from ctrlib.serving.requests import Asked, Limits, RefusedError

BATCH_ROWS = 4096  # after so many rows the model is called, whoever else waits
LOGGER = logging.getLogger("ctrlib.serving")
Read = Callable[[Predictor, bytes, Limits], Asked]


@dataclass
class Job:
    """A request that waits: its body, what reads that, and where the answer goes."""

    read: Read
    body: bytes
    answer: Future[bytes] = field(default_factory=Future)


class Scorer:
    """Answers requests in the order in which they come.

    Each is read and encoded by itself, so that a bad one is refused by itself; then all that waited when the first one
    was taken are scored together. A request that comes alone is scored at once.

    Args:
        predictor: of the model.
        limits: what is taken.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.rows = self.calls = 0  # scored, and of the model
        self._jobs: queue.Queue[Job | None] = queue.Queue(limits.waiting)
        self._thread = threading.Thread(target=self._work, name="ctrlib-scorer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that nobody has taken up."""
        return self._jobs.qsize()

    def submit(self, read: Read, body: bytes) -> Future[bytes]:
        """Where the answer to a request, as JSON, will be.

        Raises:
            RefusedError: too many wait (503).
        """
        job = Job(read, body)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise RefusedError(f"{self.limits.waiting} requests wait already: ask again in a second", 503) from None
        return job.answer

    def close(self) -> None:
        """Answer what waits, and end."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            batch: list[tuple[Job, Asked]] = []
            rows, job, left = 0, first, self._jobs.qsize()
            while True:
                if asked := self._read(job):
                    batch.append((job, asked))
                    rows += len(asked.columns.ids)
                if not left or rows >= BATCH_ROWS:
                    break
                left -= 1
                following = self._jobs.get()
                if following is None:  # the last that comes
                    self._score(batch)
                    return
                job = following
            self._score(batch)

    def _read(self, job: Job) -> Asked | None:
        """The request, if somebody waits for it and it is right."""
        if not job.answer.set_running_or_notify_cancel():
            return None
        try:
            return job.read(self.predictor, job.body, self.limits)
        except BaseException as error:  # polars panics with what is no Exception; the thread must live
            job.answer.set_exception(refusal(error))
            return None

    def _score(self, batch: list[tuple[Job, Asked]]) -> None:
        if not batch:
            return
        try:
            found = self.predictor.score_encoded([asked.columns for _, asked in batch], name=batch[0][1].name)
        except BaseException as error:
            if len(batch) == 1:
                batch[0][0].answer.set_exception(refusal(error))
                return
            half = len(batch) // 2  # whose fault it is shows alone, and the others stay together
            self._score(batch[:half])
            self._score(batch[half:])
            return
        self.calls += 1
        for (job, asked), probabilities in zip(batch, found):
            self.rows += len(asked.columns.ids)
            _answer(job, asked, probabilities)


def _answer(job: Job, asked: Asked, probabilities: pl.DataFrame) -> None:
    try:
        job.answer.set_result(json.dumps(asked.answer(probabilities), allow_nan=False).encode())
    except BaseException as error:
        job.answer.set_exception(refusal(error))


def refusal(error: BaseException) -> RefusedError:
    """What a client is told of an error: the message if the request caused it, and otherwise that it is not to blame.

    >>> refusal(KeyError("item")).status
    500
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, CtrlibError):
        return RefusedError(str(error))
    LOGGER.error("a request failed", exc_info=error)
    return RefusedError(f"the server failed at this request ({type(error).__name__}); its log says more", 500)
