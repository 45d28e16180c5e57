"""What the service keeps is for its user's eyes alone, whatever his umask and however it was kept before."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.infra.private import make_private, private_files
from app.settings import Settings
from tests.service.auth.test_keys_cli import run_keys
from tests.support.factories import Script, job_body
from tests.support.orthokv_server import Server, until
from tests.support.paths import SCRIPTED_RUNNER


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_to_others(folder: Path) -> list[str]:
    """Everything in a folder, and the folder, that its group or others may use in any way. A link has no rights of its own."""
    found = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink()]
    return [str(path) for path in found if path.stat().st_mode & 0o077]


@pytest.mark.usefixtures("open_umask")
class TestNewFiles:
    def test_all_that_a_server_and_its_worker_write_is_private(self, tmp_path: Path) -> None:
        script = Script(tmp_path / "script")
        script.write({"step": "evaluate", "run": 0, "do": "hang_until_released"})
        command = json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)])
        with Server(tmp_path / "data", {"ORTHOKV_RUNNER_COMMAND": command}) as server:
            job_id = server.post("/v1/jobs", job_body())["id"]
            until(lambda: script.is_hanging("evaluate"), "a step is at work")
            assert open_to_others(server.data) == []
            names = {path.name for path in server.data.rglob("*")}
            assert {"orthokv.db", "orthokv.db-wal", "objects", "work", "token", "secret-key"} <= names
            assert "orthokv.safetensors" in names
            script.go_on()
            server.wait_for_end(job_id)
            assert open_to_others(server.data) == []

    def test_so_is_what_keys_are_made_in(self, tmp_path: Path) -> None:
        assert run_keys(tmp_path / "data", "create", "--scope", "admin").exit_code == 0
        assert open_to_others(tmp_path / "data") == []
        assert os.umask(0) == 0  # a command leaves the process as it was

    def test_a_umask_ends_with_the_command(self, tmp_path: Path) -> None:
        with private_files():
            (tmp_path / "ours").touch()
        (tmp_path / "theirs").touch()
        assert (mode(tmp_path / "ours"), mode(tmp_path / "theirs")) == (0o600, 0o666)


class TestFilesOfBefore:
    def kept(self, folder: Path) -> Settings:
        """A data folder as earlier versions made it, under the usual umask."""
        settings = Settings(data_dir=folder / "data")
        for made in (settings.data_dir, settings.data_dir / "objects", settings.work_dir):
            made.mkdir(mode=0o755)
            made.chmod(0o755)
        for name in ("orthokv.db", "orthokv.db-wal"):
            (settings.data_dir / name).write_bytes(b"SQLite format 3\0")
            (settings.data_dir / name).chmod(0o644)
        return settings

    def test_they_are_closed_with_one_line_in_the_log(self, tmp_path: Path) -> None:
        settings = self.kept(tmp_path)
        with capture_logs() as log:
            make_private(settings)
        assert open_to_others(settings.data_dir) == []
        (line,) = log
        assert (line["event"], len(line["paths"])) == ("files.closed", 5)
        with capture_logs() as log:
            make_private(settings)
        assert log == []

    def test_so_are_those_that_lie_elsewhere(self, tmp_path: Path) -> None:
        (tmp_path / "objects").mkdir(mode=0o755)
        (tmp_path / "other.db").write_bytes(b"SQLite format 3\0")
        url, objects = f"sqlite:///{tmp_path / 'other.db'}", (tmp_path / "objects").as_uri()
        make_private(Settings(data_dir=tmp_path / "data", database_url=url, storage_url=objects))
        assert [mode(tmp_path / name) for name in ("data", "objects", "other.db")] == [0o700, 0o700, 0o600]

    def test_a_file_that_is_no_database_is_left(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        before = mode(tmp_path / "notes.txt")
        make_private(Settings(data_dir=tmp_path / "data", database_url=f"sqlite:///{tmp_path / 'notes.txt'}"))
        assert mode(tmp_path / "notes.txt") == before

    def test_a_folder_that_others_use_too_is_left_and_said(self, tmp_path: Path) -> None:
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(0o1777)
        with capture_logs() as log:
            make_private(Settings(data_dir=folder))
        assert mode(folder) == 0o1777
        assert [line["event"] for line in log] == ["files.shared"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
    def test_a_folder_with_a_file_of_another_user_is_left_and_said(self, tmp_path: Path) -> None:
        settings = self.kept(tmp_path)
        (settings.data_dir / "theirs").touch()
        os.chown(settings.data_dir / "theirs", 65534, 65534)
        with capture_logs() as log:
            make_private(settings)
        assert mode(settings.data_dir) == 0o755
        assert mode(settings.data_dir / "orthokv.db") == 0o600
        assert {line["event"] for line in log} == {"files.closed", "files.shared"}

    def test_a_server_says_so_at_its_start(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data").chmod(0o755)
        with Server(tmp_path / "data", {}) as server:
            assert mode(server.data) == 0o700
            assert "files.closed" in server.log()


def test_a_server_runs_no_code_of_the_folder_that_it_was_started_in(tmp_path: Path) -> None:
    """It may be /tmp, where everybody may write."""
    marker = tmp_path / "marker"
    (tmp_path / "workers").mkdir()
    for name in ("__init__", "tether", "supervisor", "runner"):
        (tmp_path / "workers" / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    command = [sys.executable, "-P", "-c", "import typer, app.cli; typer.run(app.cli.serve)"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--data", str(tmp_path / "data"), "--port", "0"], cwd=tmp_path, stderr=log
        )
    try:
        until(lambda: "worker.started" in (tmp_path / "log").read_text(), "its worker is up")
    finally:
        server.terminate()
        server.wait(60)
    runner = subprocess.run(
        Settings().runner_command, cwd=tmp_path, input="", capture_output=True, text=True, check=False
    )
    assert "json_invalid" in runner.stderr, "ours has read its request"
    assert not marker.exists()
