"""Byte ranges (RFC 9110, section 14): one range of one representation."""

from __future__ import annotations

import re

# No file has a byte behind 10^18; longer numbers are not read, since Python refuses those of thousands of digits.
_RANGE = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", re.ASCII | re.IGNORECASE)


class NotSatisfiable(Exception):
    """The range lies outside the representation."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, end), end exclusive, of a Range header; None when the whole representation is to be sent.

    Whatever is not a single well-formed byte range is ignored, as the RFC asks or allows; a well-formed one
    without a byte in the representation raises `NotSatisfiable`.
    """
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), size
        if match[2] != "":
            if int(match[2]) < start:
                return None
            end = min(int(match[2]) + 1, size)
    if start >= end:
        raise NotSatisfiable
    return start, end
