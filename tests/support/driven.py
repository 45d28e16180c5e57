"""The asynchronous client as if it were the synchronous one, so that one test is for both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

from orthokv_client import AsyncOrthoKV, OrthoKV


class Driven:
    """Runs every coroutine and every asynchronous iterator that its target gives."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return Driven(value, self._loop)

        def call(*arguments: Any, **keywords: Any) -> Any:
            result = value(*arguments, **keywords)
            if inspect.iscoroutine(result):
                return self._loop.run_until_complete(result)
            return self._iterate(result)

        return call

    def _iterate(self, items: Any) -> Iterator[Any]:
        while True:
            try:
                yield self._loop.run_until_complete(anext(items))
            except StopAsyncIteration:
                return


class Clients:
    """Makes clients of one kind, and closes them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._loop = asyncio.new_event_loop()
        self._made: list[Any] = []

    def __call__(self, url: str, **more: Any) -> Any:
        made: Any
        if self._kind == "async":

            async def make() -> AsyncOrthoKV:
                return AsyncOrthoKV(url, **more)

            made = Driven(self._loop.run_until_complete(make()), self._loop)
        else:
            made = OrthoKV(url, **more)
        self._made.append(made)
        return made

    def close(self) -> None:
        for made in self._made:
            made.close()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
