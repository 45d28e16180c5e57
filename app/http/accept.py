"""Choosing between JSON and one other representation by the Accept header (RFC 9110, section 12.5.1)."""

from __future__ import annotations

JSON = "application/json"


def prefers(header: str, offered: str) -> bool:
    """Whether a client wants the `offered` media type rather than JSON.

    JSON is what everybody gets who does not name the other: a browser that takes `*/*` last, for one.
    """
    weight, named = _weight(header, offered)
    return named and weight > 0 and weight >= _weight(header, JSON)[0]


def _weight(header: str, media_type: str) -> tuple[float, bool]:
    """The weight of a media type by the most specific range that covers it, and whether that is more than `*/*`."""
    kind = media_type.partition("/")[0]
    specific = {"*/*": 0, f"{kind}/*": 1, media_type: 2}
    best, found = -1, 0.0
    for part in header.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if (rank := specific.get(name, -1)) > best:
            best, found = rank, _quality(parameters)
    return found, best > 0


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0  # not a weight: the range is not wanted
    return 1.0
