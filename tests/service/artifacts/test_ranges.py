"""Byte ranges against a reference that enumerates bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.artifacts.ranges import NotSatisfiable, parse_range
from app.http.etags import matches

small = st.integers(0, 30)


def wanted(first: int | None, last: int | None, size: int) -> list[int]:
    """Offsets that the range names, by RFC 9110's words."""
    if first is None:
        assert last is not None
        return [offset for offset in range(size) if offset >= size - last]
    return [offset for offset in range(size) if offset >= first and (last is None or offset <= last)]


@given(first=st.none() | small, last=st.none() | small, size=small)
def test_a_range_names_the_same_bytes_as_the_reference(
    first: int | None, last: int | None, size: int
) -> None:
    if first is None and last is None:
        return
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is not None and last is not None and last < first:
        assert parse_range(header, size) is None  # not well-formed: ignored
        return
    offsets = wanted(first, last, size)
    if not offsets:
        with pytest.raises(NotSatisfiable):
            parse_range(header, size)
        return
    assert parse_range(header, size) == (offsets[0], offsets[-1] + 1)


@given(st.text(max_size=40), small)
def test_no_header_breaks_the_parser(header: str, size: int) -> None:
    try:
        part = parse_range(header, size)
    except NotSatisfiable:
        return
    assert part is None or 0 <= part[0] < part[1] <= size


@pytest.mark.parametrize(
    "header", [None, "", "bytes=", "bytes=-", "items=0-1", "bytes=0-1,3-4", "bytes=a-b", "0-1"]
)
def test_what_is_not_one_byte_range_is_ignored(header: str | None) -> None:
    assert parse_range(header, 10) is None


def test_entity_tags_match_by_name() -> None:
    assert matches('"v1"', '"v1"')
    assert matches('W/"v1"', '"v1"')
    assert matches('"v0", "v1"', '"v1"')
    assert matches("*", '"v1"')
    assert not matches(None, '"v1"')
    assert not matches('"v11"', '"v1"')
