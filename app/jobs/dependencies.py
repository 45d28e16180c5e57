"""What routes of jobs ask for: the id in the path, the watch over jobs that change."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request

from app.infra.ids import id_pattern
from app.jobs.waiting import JobWatch

JobId = Annotated[str, Path(pattern=id_pattern("job"))]


async def _watch(request: Request) -> JobWatch:  # no plain function: FastAPI would run it in a thread
    watch: JobWatch = request.app.state.watch
    return watch


Watch = Annotated[JobWatch, Depends(_watch)]
