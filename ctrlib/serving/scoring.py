"""Two threads that answer the requests of a server: what waits for the model is put together into one call of it."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ctrlib.errors import CtrlibError
from ctrlib.serving.predictor import Predictor, Probabilities
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
    """Answers requests in the order in which they come, in two threads: one reads, one calls the model.

    Each request is read and encoded by itself, so that a bad one is refused by itself, while the model computes for
    those before: reading is Python's work, and the model is left without its lock. All that is encoded when the model
    is free are scored together. A request that comes alone is scored at once.

    Args:
        predictor: of the model.
        limits: what is taken.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.rows = self.calls = 0  # scored, and of the model
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._encoded: queue.SimpleQueue[tuple[Job, Asked] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"ctrlib-{name}", daemon=True)
            for name, work in (("reader", self._read_all), ("scorer", self._score_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Requests that nobody has taken up, or that are encoded and wait for the model."""
        return self._jobs.qsize() + self._encoded.qsize()

    def submit(self, read: Read, body: bytes) -> Future[bytes]:
        """Where the answer to a request, as JSON, will be.

        Raises:
            RefusedError: too many wait (503).
        """
        if self.waiting >= self.limits.waiting:
            raise RefusedError(f"{self.limits.waiting} requests wait already: ask again in a second", 503)
        job = Job(read, body)
        self._jobs.put(job)
        return job.answer

    def close(self) -> None:
        """Answer what waits, and end."""
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _read_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            if asked := self._read(job):
                self._encoded.put((job, asked))
        self._encoded.put(None)  # the last that comes

    def _read(self, job: Job) -> Asked | None:
        """The request, if somebody waits for it and it is right."""
        if not job.answer.set_running_or_notify_cancel():
            return None
        try:
            return job.read(self.predictor, job.body, self.limits)
        except BaseException as error:  # polars panics with what is no Exception; the thread must live
            job.answer.set_exception(refusal(error))
            return None

    def _score_all(self) -> None:
        last = False
        while not last and (first := self._encoded.get()) is not None:
            batch, rows = [first], len(first[1].columns.ids)
            while rows < BATCH_ROWS and not self._encoded.empty():  # which nobody else takes from
                if (following := self._encoded.get()) is None:
                    last = True
                    break
                batch.append(following)
                rows += len(following[1].columns.ids)
            self._score(batch)

    def _score(self, batch: list[tuple[Job, Asked]]) -> None:
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


def _answer(job: Job, asked: Asked, probabilities: Probabilities) -> None:
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
