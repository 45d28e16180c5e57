"""What the headers of an upload say of its bytes (RFC 9530)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from app.http.errors import Code, Problem

_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]*):")


def expected_sha256(headers: Mapping[str, str]) -> str | None:
    """The SHA-256 that the client announces, if any, in hexadecimal; refuses what makes the bytes other than they look."""
    if "content-range" in headers:
        raise Problem(Code.BAD_REQUEST, "An upload is sent whole: a part of it cannot be put.")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Problem(Code.UNSUPPORTED_MEDIA_TYPE, "Send the bytes as they are, without a Content-Encoding.")
    found = {
        digest for name in ("content-digest", "repr-digest") for digest in _digests(headers.get(name, ""))
    }
    if len(found) > 1:
        raise Problem(Code.BAD_REQUEST, "The digests of this upload differ from each other.")
    return next(iter(found), None)


def _digests(header: str) -> list[str]:
    try:
        return [base64.b64decode(value, validate=True).hex() for value in _SHA256.findall(header)]
    except binascii.Error as error:
        raise Problem(Code.BAD_REQUEST, "The digest of this upload is not base64.") from error
