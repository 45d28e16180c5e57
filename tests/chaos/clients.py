"""Clients that send what they may send, repeat what was not answered, and remember what was."""

from __future__ import annotations

import hashlib
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.support.fleet import Api

ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Acknowledged:
    """What answers have promised."""

    jobs: dict[str, str] = field(default_factory=dict)
    """Idempotency key -> job."""
    cancelled: set[str] = field(default_factory=set)
    datasets: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    """Answers that contradict earlier ones."""
    repeated: Counter[str] = field(default_factory=Counter)
    """Requests that were sent again, by why: an error of the connection, or a status."""


class Client(threading.Thread):
    """One client. Its jobs are its own, so the order of its requests is the order of what happens to them."""

    def __init__(
        self,
        api: Api,
        body: Callable[[random.Random], dict[str, Any]],
        rng: random.Random,
        ended: threading.Event,
        *,
        outstanding: int,
    ) -> None:
        super().__init__(daemon=True)
        self._api, self._body, self._rng, self._ended = api, body, rng, ended
        self._outstanding = outstanding
        self._open: list[str] = []
        self._bodies: dict[str, dict[str, Any]] = {}
        self._http = httpx2.Client(timeout=20)
        self.said = Acknowledged()

    def run(self) -> None:
        while not self._ended.is_set():
            chance = self._rng.random()
            if chance < 0.12 and self._open:
                self._cancel(self._rng.choice(self._open))
            elif chance < 0.2 and self.said.jobs:
                self._repeat()
            elif chance < 0.3:
                self._retry_one()
            elif len(self._open) < self._outstanding:
                self._submit()
            self._look()
            self._ended.wait(self._rng.uniform(0.0, 0.3))

    def _send(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **content: Any
    ) -> httpx2.Response | None:
        """The answer, however often it has to be asked for; None when the time is up without one."""
        while not self._ended.is_set():
            try:
                sent = {**(headers or {}), **self._api.headers}
                response = self._http.request(method, self._api.url + path, headers=sent, **content)
            except (httpx2.TransportError, FileNotFoundError) as error:  # no token: the API starts again
                why = type(error).__name__
            else:
                # 401: the token of before the API was killed.
                if response.status_code < 500 and response.status_code not in (401, 429):
                    return response
                why = str(response.status_code)
            self.said.repeated[why] += 1
            time.sleep(0.2)
        return None

    def _submit(self) -> None:
        body, key = self._body(self._rng), uuid.UUID(int=self._rng.getrandbits(128)).hex
        if self._rng.random() < 0.2 and (dataset := self._upload()) is not None:
            body["dataset"] = {"id": dataset, "num_samples": 4, "sequence_length": 64}
        answer = self._send("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": key})
        if answer is None:
            return
        if answer.status_code != 201:
            self.said.broken.append(f"POST /v1/jobs: {answer.status_code} {answer.text}")
            return
        job_id = answer.json()["id"]
        self.said.jobs[key] = job_id
        self._bodies[key] = body
        self._open.append(job_id)

    def _repeat(self) -> None:
        key = self._rng.choice(sorted(self.said.jobs))
        headers = {"Idempotency-Key": key}
        answer = self._send("POST", "/v1/jobs", json=self._bodies[key], headers=headers)
        if answer is not None and answer.json().get("id") != self.said.jobs[key]:
            self.said.broken.append(
                f"{key} stood for {self.said.jobs[key]}, now for {answer.json().get('id')}"
            )

    def _cancel(self, job_id: str) -> None:
        answer = self._send("POST", f"/v1/jobs/{job_id}/cancel")
        if answer is not None and answer.status_code in (200, 202):
            self.said.cancelled.add(job_id)

    def _retry_one(self) -> None:
        candidates = sorted(set(self.said.jobs.values()) - set(self._open))
        if not candidates:
            return
        job_id = self._rng.choice(candidates[-10:])
        # Whatever is answered, and if nothing is: from here on this job may be open again.
        answer = self._send("POST", f"/v1/jobs/{job_id}/retry")
        if answer is None or answer.status_code == 202 or "Only a failed" not in answer.text:
            self.said.cancelled.discard(job_id)
            self._open.append(job_id)
        elif job_id in self.said.cancelled:
            # Refused although it is cancelled: an earlier, unanswered request has opened it.
            self.said.cancelled.discard(job_id)

    def _upload(self) -> str | None:
        text = self._rng.randbytes(2000).hex().encode()
        made = self._send(
            "POST",
            "/v1/datasets",
            json={"filename": "a.txt"},
            headers={"Idempotency-Key": uuid.UUID(int=self._rng.getrandbits(128)).hex},
        )
        if made is None:
            return None
        dataset: str = made.json()["id"]
        put = self._send("PUT", f"/v1/datasets/{dataset}/content", content=text)
        digest = hashlib.sha256(text).hexdigest()
        done = put and self._send("POST", f"/v1/datasets/{dataset}/complete", json={"sha256": digest})
        if not done:
            return None
        if done.status_code != 200:
            self.said.broken.append(f"complete: {done.status_code} {done.text}")
            return None
        self.said.datasets.add(dataset)
        return dataset

    def _look(self) -> None:
        """Forget jobs that have ended, so that others may be sent."""
        if not self._open:
            return
        job_id = self._rng.choice(self._open)
        answer = self._send("GET", f"/v1/jobs/{job_id}")
        if answer is None:
            return
        if answer.status_code != 200:
            self.said.broken.append(f"GET {job_id}: {answer.status_code}")
            self._open.remove(job_id)
        elif answer.json()["status"] in ENDED:
            self._open.remove(job_id)
