"""`orthokv api`, `worker` and `migrate` refuse what they cannot do, in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.migrate import require_schema
from tests.support.paths import REPOSITORY

_COMMANDS = {
    "api": "import typer, app.cli; typer.run(app.cli.api)",
    "migrate": "import typer, app.cli; typer.run(app.cli.migrate)",
    "worker": "import typer, workers.cli; typer.run(workers.cli.worker)",
}


def orthokv(command: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _COMMANDS[command], *arguments],
        env={"PATH": "/usr/bin", **{f"ORTHOKV_{name}": value for name, value in settings.items()}},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        check=False,
    )


def refused(command: str, *arguments: str, **settings: str) -> str:
    done = orthokv(command, *arguments, **settings)
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_the_api_leaves_the_loopback_only_with_keys(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    arguments = ("--host", "0.0.0.0", "--port", "0")
    said = refused("api", *arguments, DATABASE_URL=url, AUTH_REQUIRED="false")
    assert "ORTHOKV_AUTH_REQUIRED must not be false" in said
    assert orthokv("migrate", DATABASE_URL=url).returncode == 0
    assert "there is no API key yet" in refused("api", *arguments, DATABASE_URL=url)


@pytest.mark.parametrize("command", ["api", "worker"])
def test_a_database_that_lacks_migrations_is_refused(command: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    assert "run `orthokv migrate` once" in refused(command, DATABASE_URL=url)


def test_migrate_makes_the_schema(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    for _ in range(2):
        assert orthokv("migrate", DATABASE_URL=url).returncode == 0
    require_schema(url)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("--gpu-class", "H 100"), {}, "gpu_classes"),
        ((), {"BROKER_URL": "amqp://x"}, "must be a redis"),
        ((), {"STORAGE_URL": "nowhere://x"}, "nowhere://x"),
    ],
)
def test_a_worker_refuses_settings_that_cannot_be(
    tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    assert orthokv("migrate", DATABASE_URL=url).returncode == 0
    assert message in refused("worker", *arguments, DATABASE_URL=url, DATA_DIR=str(tmp_path), **settings)


def test_a_database_that_is_away_is_named() -> None:
    said = refused("migrate", DATABASE_URL="postgresql://nobody:secret@127.0.0.1:9/nothing")
    assert "127.0.0.1:9/nothing cannot be used" in said
    assert "secret" not in said
