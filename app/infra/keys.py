"""The text of API keys, `okv_<key id>_<secret>_<checksum>`, and of a server's own token, `okv_local_<secret>_<checksum>`.

The fixed prefix and the checksum let secret scanners find a leaked key without asking the server, and let the
server refuse garbage without asking the database.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import zlib

from app.infra.ids import id_pattern

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_SECRET_LENGTH = 43  # 256 bits
_CHECKSUM_LENGTH = 6  # 32 bits

_ID = id_pattern("key").strip("^$").removeprefix("key_")
_REST = rf"([0-9A-Za-z]{{{_SECRET_LENGTH}}})_([0-9A-Za-z]{{{_CHECKSUM_LENGTH}}})"
_KEY = re.compile(rf"okv_({_ID})_{_REST}")
_TOKEN = re.compile(rf"okv_local_{_REST}")
_SECRET = re.compile(rf"okv_({_ID}|local)_{_REST}")


def generate(key_id: str) -> str:
    """A new secret key whose row has this id."""
    return _with_checksum(f"{prefix(key_id)}_{_secret()}")


def generate_token() -> str:
    """A new token of a server's owner. No row knows it: it is good for as long as the server that made it runs."""
    return _with_checksum(f"okv_local_{_secret()}")


def is_token(text: str) -> bool:
    """Whether this has the form of an owner's token."""
    return _TOKEN.fullmatch(text) is not None and _with_checksum(text.rpartition("_")[0]) == text


def prefix(key_id: str) -> str:
    """The part of a key that is not secret: it finds the row."""
    return f"okv_{key_id.removeprefix('key_')}"


def key_id_of(text: str) -> str | None:
    """The id of the row that a key belongs to; None when the text is not a key at all."""
    match = _KEY.fullmatch(text)
    if match is None or _with_checksum(text.rpartition("_")[0]) != text:
        return None
    return f"key_{match[1]}"


def digest(text: str, pepper: str) -> str:
    """What is stored of a key.

    The secret is 256 random bits, so no slow hash is needed. With a pepper, which is not in the database, who
    can write to the database still cannot make a key.
    """
    return hmac.new(pepper.encode(), text.encode(), hashlib.sha256).hexdigest()


def redact(text: str) -> str:
    """The text with every key and token in it cut down to its prefix."""
    return _SECRET.sub(lambda match: f"okv_{match[1]}_[redacted]", text)


def _secret() -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(_SECRET_LENGTH))


def _with_checksum(body: str) -> str:
    value, checksum = zlib.crc32(body.encode()), ""
    for _ in range(_CHECKSUM_LENGTH):
        value, digit = divmod(value, 62)
        checksum = _BASE62[digit] + checksum
    return f"{body}_{checksum}"
