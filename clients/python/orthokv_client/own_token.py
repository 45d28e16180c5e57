"""The token of a server of the same user on the loopback, which the server keeps in a file of this user alone.

The file is named after the server's address, and the server holds a lock on it for as long as it lives. A file that nobody
holds is of a server that is gone: whoever has its port now must not see the token.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from orthokv_client.errors import TokenUnreadable

_TOKEN = re.compile(r"okv_local_[0-9A-Za-z]+_[0-9A-Za-z]+", re.ASCII)
# Both addresses that a name may stand for: another user may have the one that the server has not.
_ADDRESSES = {"localhost": ("127.0.0.1", "::1")}


def own_token(url: str) -> httpx2.Auth | None:
    """What lets requests into a loopback server of this user; None for other servers.

    The token is ORTHOKV_TOKEN, or in the file ORTHOKV_TOKEN_FILE, or in the server's own file. Files are read at every
    request: a server that was started again has another token. Raises `ValueError`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host not in ("localhost", "::1") and not host.startswith("127."):
        return None
    told = os.environ.get("ORTHOKV_TOKEN", "").strip()
    if told and not is_token(told):
        raise ValueError("ORTHOKV_TOKEN holds no token: one begins with okv_local_")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return OwnToken(host, port, told=told, file=os.environ.get("ORTHOKV_TOKEN_FILE", ""))


def is_token(text: str) -> bool:
    """Whether a text has the form of a token. A text that has not is not sent anywhere."""
    return _TOKEN.fullmatch(text) is not None


class OwnToken(httpx2.Auth):
    """Sends the token, if there is one, with each request."""

    def __init__(self, host: str, port: int, *, told: str, file: str) -> None:
        self._host, self._port, self._told, self._file = host, port, told, file

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        """Raises `TokenUnreadable`."""
        host, token = self._found()
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
            if host != self._host:
                request.url = request.url.copy_with(host=host)  # `Host` stays as it is
        yield request

    def _found(self) -> tuple[str, str]:
        if self._told:
            return self._host, self._told
        if self._file:
            return self._host, _read(Path(self._file), locked=False)
        with contextlib.suppress(RuntimeError):  # a user without a home has no servers, either
            folder = _folder()
            for address in _ADDRESSES.get(self._host, (self._host,)):
                if token := _read(folder / f"{address}-{self._port}", locked=True):
                    return address, token
        return self._host, ""


def _folder() -> Path:
    """As in `app/auth/owner.py`."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "orthokv" / "servers"


def _read(file: Path, *, locked: bool) -> str:
    """The token of a file; of one that only a living server locks, empty when there is no such server."""
    try:
        with file.open(encoding="ascii") as opened:
            if locked and not _is_locked(opened.fileno()):
                return ""
            token = opened.read(1024).strip()
    except FileNotFoundError as error:
        if locked:
            return ""
        raise TokenUnreadable(f"cannot read the server's token from {file}: there is no such file") from error
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no token"
        raise TokenUnreadable(f"cannot read the server's token from {file}: {reason}") from error
    if not is_token(token):
        raise TokenUnreadable(f"cannot read the server's token from {file}: it holds no token")
    return token


def _is_locked(descriptor: int) -> bool:
    import fcntl  # where there is none, there is no server of this user

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
