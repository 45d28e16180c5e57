"""Requests per key: a token bucket in this process.

Not in the database: a row per key would make every read a write, and on SQLite every write waits for the one
writer. The price is that each API process counts on its own, so N of them let N times as many through.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from app.http.errors import Code, Problem


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """At most `requests` at once, and `requests` in each window over time, for each key.

    Only keys that exist get a bucket, so there are never more buckets than keys.
    """

    def __init__(
        self, requests: int, window_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._requests = requests
        self._window = window_seconds
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: str) -> None:
        """Count a request; raises the problem that says when to come back."""
        moment = self._clock()
        bucket = self._buckets.setdefault(key, _Bucket(float(self._requests), moment))
        refilled = bucket.tokens + (moment - bucket.filled_at) * self._requests / self._window
        bucket.tokens, bucket.filled_at = min(float(self._requests), refilled), moment
        if bucket.tokens < 1:
            wait = math.ceil((1 - bucket.tokens) * self._window / self._requests)
            raise Problem(
                Code.RATE_LIMITED,
                f"This key may send {self._requests} requests in {self._window:g} s; come back in {wait} s.",
                headers={
                    "Retry-After": str(wait),
                    "RateLimit-Policy": f'"default";q={self._requests};w={math.ceil(self._window)}',
                    "RateLimit": f'"default";r=0;t={wait}',
                },
            )
        bucket.tokens -= 1
