"""Secrets at rest: encrypted with a key that is not in the database.

The sealed text begins with the id of its key, so that what an older key sealed can be found and sealed again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from app.settings import Settings, split_keys


class CannotOpen(Exception):
    """None of the server's keys has sealed this."""


class Sealer:
    """Seals with the first key, opens with any."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])
        self.key_id = hashlib.sha256(keys[0].encode()).hexdigest()[:12]

    def seal(self, text: str) -> str:
        return f"{self.key_id}:{self._fernet.encrypt(text.encode()).decode()}"

    def open(self, sealed: str) -> str:
        """The secret. Raises `CannotOpen`."""
        try:
            return self._fernet.decrypt(sealed.partition(":")[2].encode()).decode()
        except InvalidToken as error:
            raise CannotOpen("none of the keys of ORTHOKV_SECRET_KEYS opens this secret") from error


def make_sealer(settings: Settings) -> Sealer | None:
    """None when the server has no key, and so takes no secrets."""
    keys = split_keys(settings.secret_keys)
    return Sealer(keys) if keys else None


def own_key(folder: Path) -> str:
    """The key that a data folder keeps in a file of its owner alone, made on first use."""
    file = folder / "secret-key"
    if not file.exists():
        # Whole or not at all: a torn key would lock its secrets away for good.
        draft = folder / f"secret-key.{os.getpid()}"
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(Fernet.generate_key())
            stream.flush()
            os.fsync(stream.fileno())
        draft.rename(file)
    return file.read_text(encoding="ascii").strip()
