"""The asynchronous client's connection. The synchronous one is made from this file by `make client`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2

from orthokv_client import models
from orthokv_client.base import Model
from orthokv_client.download import CONNECTIONS, Progress, download
from orthokv_client.protocol import PATIENT, AnyModel, Attempts, Call, Retry, Settings, parsed, validated
from orthokv_client.running_async import blocking, chunks, sleep

Item = TypeVar("Item", bound=Model)


class AsyncConnection:
    """Calls of one server, repeated where that is sound: what every resource speaks through."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._http = httpx2.AsyncClient(**settings.options())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(self, call: Call, *, retry: Retry | None = None) -> httpx2.Response:
        """The successful answer to a call, repeated where that is sound."""
        attempts = Attempts(call, self.settings, retry)
        while True:
            try:
                response = await self._http.request(call.method, call.path, **call.arguments())
            except httpx2.TransportError as error:
                pause = attempts.failed(error)
            else:
                if response.is_success:
                    return response
                pause = attempts.refused(response)
            await sleep(pause)

    async def get(self, model: type[AnyModel], path: str, **query: Any) -> AnyModel:
        """What a GET answers."""
        return parsed(await self.send(Call("GET", path, query)), model)

    async def usage(self) -> models.Usage:
        """What the key's project uses of its limits."""
        return await self.get(models.Usage, "/v1/usage")

    async def put(self, path: str, file: Path) -> None:
        """Send a file as the body of a PUT, from its beginning at every attempt."""
        call = Call("PUT", path)
        attempts = Attempts(call, self.settings)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(file.stat().st_size)}
        while True:
            try:
                response = await self._http.request("PUT", path, content=chunks(file), headers=headers)
            except httpx2.TransportError as error:
                pause = attempts.failed(error)
            else:
                if response.is_success:
                    return
                pause = attempts.refused(response)
            await sleep(pause)

    async def items(
        self, item: type[Item], path: str, query: Mapping[str, Any], page_size: int = 100
    ) -> AsyncIterator[Item]:
        """All items of a list, asked for page by page."""
        after = None
        while True:
            page = (await self.send(Call("GET", path, {**query, "limit": page_size, "after": after}))).json()
            for body in page["data"]:
                yield validated(body, item)
            if not page["has_more"]:
                return
            after = page["last_id"]

    async def download(
        self,
        artifacts: Sequence[models.Artifact],
        folder: Path | str,
        *,
        connections: int = CONNECTIONS,
        progress: Progress | None = None,
    ) -> list[Path]:
        """Files into a folder: several ranges at once, resumed where they broke off, checked by digest."""
        work = partial(
            download, self.settings, artifacts, Path(folder), connections=connections, progress=progress
        )
        return await blocking(lambda stop: work(stop=stop))

    async def stream(self, job_id: str, after: int) -> AsyncIterator[models.Event]:
        """A job's events after a number, until the job is over. A stream that breaks is opened again, at the next number."""
        path = f"/v1/jobs/{job_id}/events"
        attempts = Attempts(Call("GET", path), self.settings, PATIENT)
        while True:
            call = Call("GET", path, headers={"Accept": "text/event-stream", "Last-Event-ID": str(after)})
            pause = 0.1  # after a stream that just ended: no server may make this loop a busy one
            try:
                async with self._http.stream(call.method, call.path, **call.arguments()) as response:
                    if response.status_code == 204:
                        return
                    if response.is_success:
                        async for message in httpx2.EventSource(response):
                            event = validated(message.json(), models.Event)
                            if event.seq > after:
                                after = event.seq
                                attempts = Attempts(call, self.settings, PATIENT)
                                yield event
                    else:
                        await response.aread()
                        pause = attempts.refused(response)
            except httpx2.TransportError as error:
                pause = attempts.failed(error)
            await sleep(pause)
