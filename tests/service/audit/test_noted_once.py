"""An act of many requests is noted once, and nobody goes on without that note."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.audit import window
from app.audit.window import NotedOnce


class Acts:
    """Counts notes; a note takes a moment, and may fail."""

    def __init__(self, *failures: bool) -> None:
        self._failures = list(failures)
        self.notes = self.repetitions = self.committed = 0

    async def first(self) -> str:
        self.notes += 1
        fails = bool(self._failures and self._failures.pop(0))
        await asyncio.sleep(0.01)
        if fails:
            raise ConnectionError
        self.committed += 1
        return "first"

    async def again(self) -> str:
        assert self.committed, "nothing is done before a note is committed"
        self.repetitions += 1
        return "again"


async def many(noted: NotedOnce, acts: Acts, count: int, name: str = "a") -> list[Any]:
    calls = [noted.run(name, first=acts.first, again=acts.again) for _ in range(count)]
    return await asyncio.gather(*calls, return_exceptions=True)


def test_all_at_once_wait_for_one_note() -> None:
    acts = Acts()
    assert asyncio.run(many(NotedOnce(), acts, 20)) == ["first"] + ["again"] * 19
    assert (acts.notes, acts.repetitions) == (1, 19)


def test_a_note_that_failed_is_made_by_the_next() -> None:
    acts = Acts(True, True)
    answers = asyncio.run(many(NotedOnce(), acts, 5))
    assert [type(answer) for answer in answers[:2]] == [ConnectionError] * 2
    assert answers[2:] == ["first", "again", "again"]


def test_other_acts_have_notes_of_their_own() -> None:
    noted, acts = NotedOnce(), Acts()

    async def run() -> None:
        for name in "abab":
            await many(noted, acts, 1, name)

    asyncio.run(run())
    assert acts.notes == 2


def test_a_note_is_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    noted, acts = NotedOnce(seconds=600), Acts()
    moments = {1000.0: 1, 1599.0: 1, 1600.0: 2, 2100.0: 2}
    for moment, notes in moments.items():
        monkeypatch.setattr(window, "now", lambda moment=moment: moment)
        assert asyncio.run(noted.run("a", first=acts.first, again=acts.again))
        assert acts.notes == notes


def test_what_is_forgotten_is_noted_again() -> None:
    noted, acts = NotedOnce(limit=2), Acts()
    for name in "abc":
        asyncio.run(many(noted, acts, 1, name))
    assert acts.notes == 3
    asyncio.run(many(noted, acts, 1, "c"))
    assert acts.notes == 3
    asyncio.run(many(noted, acts, 1, "a"))
    assert acts.notes == 4
