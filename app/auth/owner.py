"""The owner of a loopback server: whoever started it, told from other users of the machine by a token.

Reaching the loopback proves nothing about who asks. So the server makes a token at every start and writes it to files that
its user alone can read: one in the data folder, and one where clients of the same user look for it, named after the
server's address and locked for as long as the server lives. By the lock a client knows that the address is still that
server's, and not that of somebody who took the port after it was gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog
from pydantic import SecretStr

from app.auth.exposure import Exposed
from app.infra.keys import generate_token, is_token
from app.settings import Settings

TOKEN_FILE = "token"

log = structlog.get_logger(__name__)


def is_owner(text: str, settings: Settings) -> bool:
    """Whether this is the token of the server's owner, in constant time. A server that takes keys alone has none."""
    token = settings.token.get_secret_value()
    if settings.auth_required or not token:
        return False
    return hmac.compare_digest(text.encode(), token.encode())


@contextlib.contextmanager
def admitted(settings: Settings, listening: socket.socket) -> Iterator[Settings]:
    """Settings with the owner's token, and its files for as long as this is open; as they are where keys alone count.

    Raises `Exposed` when the operator's own token is none.
    """
    if settings.auth_required:
        yield settings
        return
    token = settings.token.get_secret_value() or generate_token()
    if not is_token(token):
        raise Exposed("ORTHOKV_TOKEN is not a token as servers make them: one begins with okv_local_")
    with contextlib.ExitStack() as files:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.enter_context(_written(settings.data_dir / TOKEN_FILE, token))
        address, port = listening.getsockname()[:2]
        try:
            files.enter_context(_written(own_folder() / f"{address}-{port}", token))
        except (OSError, RuntimeError) as error:  # a user without a home, or with one that cannot be written
            log.warning(
                "auth.token_not_shown",
                error=str(error),
                meaning="clients need ORTHOKV_TOKEN_FILE, which is the file 'token' of the data folder",
            )
        log.info("auth.owner", meaning="requests need the token of the data folder, or an API key")
        yield settings.model_copy(update={"token": SecretStr(token)})


def own_folder() -> Path:
    """Where the servers of this user show their tokens, and clients look for them; made if it is missing."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    folder = folder / "orthokv" / "servers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to another user")
    for path in (folder.parent, folder):
        path.chmod(0o700)
    _sweep(folder)
    return folder


@contextlib.contextmanager
def _written(file: Path, token: str) -> Iterator[None]:
    """A file of its owner alone that holds the token, locked; it goes with the server."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, f"{token}\n".encode())
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # before anybody can find it
        draft.rename(file)
        try:
            yield
        finally:
            if _is(descriptor, file):  # not that of a server that took over the address
                file.unlink()
    finally:
        draft.unlink(missing_ok=True)
        os.close(descriptor)


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _sweep(folder: Path) -> None:
    """Delete what killed servers left: files that nobody holds a lock on."""
    for file in folder.iterdir():
        if file.name.startswith("."):
            continue  # not shown yet
        with contextlib.suppress(OSError):  # held by a living server, or swept by another one
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
            finally:
                os.close(descriptor)
