"""Which representation an Accept header asks for."""

from __future__ import annotations

import pytest

from app.http.accept import prefers

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("image/png", True),
        ("IMAGE/PNG", True),
        ("image/*", True),
        ("image/png, application/json;q=0.5", True),
        ("image/png;q=0.2, application/json", False),
        ("image/png;q=0", False),
        ("image/png;q=0, image/*", False),
        ("image/png;q=often", False),
        ("application/json", False),
        ("*/*", False),
        ("", False),
        ("image/pngx", False),
        (BROWSER, False),
    ],
)
def test_a_picture_is_sent_to_those_who_name_it(header: str, wanted: bool) -> None:
    assert prefers(header, "image/png") is wanted
