"""A loopback server lets its owner in, by a token, and no other user of the machine."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from typer.testing import CliRunner

from app.auth.exposure import Exposed
from app.auth.owner import admitted, own_folder
from app.http.errors import PROBLEM_JSON
from app.infra.database import SyncDatabase
from app.infra.keys import generate_token, is_token, redact
from app.main import create_app
from app.server import bound
from app.settings import Settings
from orthokv_client import OrthoKV, TokenUnreadable, Unauthenticated
from orthokv_client.cli import jobs
from orthokv_client.own_token import _folder, own_token
from tests.service.auth.test_auth_walk import call
from tests.service.cli.test_cli import serve
from tests.support.factories import job_body
from tests.support.orthokv_server import Server
from tests.support.paths import REPOSITORY
from tests.support.serving import serving
from tests.support.tenants import ALL, OWNER, PROBES, TOKEN, bearer, new_key, new_project, operations


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestText:
    def test_a_token_is_told_from_garbage_and_from_others(self) -> None:
        first, second = generate_token(), generate_token()
        assert first != second
        assert is_token(first)
        assert not is_token(first[:-1] + ("0" if first[-1] != "0" else "1"))
        assert not is_token(f"okv_local_{'0' * 43}_000000")

    def test_logs_and_problems_cut_it_out(self) -> None:
        token = generate_token()
        assert redact(f"GET /docs?token={token} HTTP/1.1") == "GET /docs?token=okv_local_[redacted] HTTP/1.1"


class TestRequests:
    @pytest.fixture
    def nobody(self, settings: Settings) -> Iterator[TestClient]:
        with TestClient(create_app(settings), raise_server_exceptions=False) as client:
            yield client

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Authorization": ""},
            bearer(generate_token()),
            bearer(TOKEN[:-1]),
            bearer(f"{TOKEN} "[1:]),
            {"Authorization": f"Basic {TOKEN}"},
            {"Cookie": f"token={TOKEN}"},
        ],
    )
    def test_every_route_but_the_probes_is_closed_without_the_token(
        self, nobody: TestClient, headers: dict[str, str]
    ) -> None:
        api = nobody.app
        assert isinstance(api, FastAPI)
        for operation in operations(api):
            answer = call(nobody, operation, headers)
            if operation.path in PROBES:
                assert answer.status_code == 200, operation
                continue
            assert answer.status_code == 401, operation
            assert answer.headers["content-type"] == PROBLEM_JSON
            assert answer.headers["www-authenticate"].startswith("Bearer ")

    def test_the_token_opens_them(self, client: TestClient) -> None:
        api = client.app
        assert isinstance(api, FastAPI)
        for operation in operations(api):
            assert call(client, operation, {}).status_code not in (401, 403), operation

    def test_an_application_without_a_token_lets_nobody_in(self, settings: Settings) -> None:
        bare = settings.model_copy(update={"token": SecretStr("")})
        with TestClient(create_app(bare)) as client:
            for headers in ({}, bearer(""), OWNER):
                assert client.get("/v1/jobs", headers=headers).status_code == 401
            assert client.get("/docs", headers={"Cookie": "orthokv-docs-80="}).status_code == 401

    def test_where_keys_alone_count_the_token_is_refused(self, settings: Settings) -> None:
        keyed = settings.model_copy(update={"auth_required": True})
        with TestClient(create_app(keyed), headers=OWNER) as client:
            assert client.get("/v1/jobs").status_code == 401

    def test_keys_do_not_take_the_token_from_its_owner(
        self, client: TestClient, database: SyncDatabase
    ) -> None:
        new_key(database, new_project(database, "tenant"), ALL)
        assert client.get("/v1/jobs").status_code == 200


class TestPages:
    @pytest.fixture
    def browser(self, settings: Settings) -> Iterator[TestClient]:
        with TestClient(create_app(settings), follow_redirects=False) as client:
            yield client

    def test_the_printed_address_opens_them_and_nothing_else(self, browser: TestClient) -> None:
        assert browser.get("/docs").status_code == 401
        moved = browser.get("/docs", params={"token": TOKEN})
        assert (moved.status_code, moved.headers["location"]) == (303, "/docs")
        cookie = moved.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN.split("_")[2] not in cookie
        assert "swagger" in browser.get("/docs").text
        assert browser.get("/openapi.json").json()["info"]["title"] == "OrthoKV"
        assert browser.get("/v1/jobs").status_code == 401

    @pytest.mark.parametrize(
        "token",
        ["", "okv_local_", generate_token(), TOKEN[:-1]],
        ids=["none", "its prefix", "another", "cut"],
    )
    def test_another_token_opens_nothing(self, browser: TestClient, token: str) -> None:
        for headers in ({}, {"Cookie": f"orthokv-docs-80={token}"}):
            refused = browser.get("/docs", params={"token": token}, headers=headers)
            assert (refused.status_code, "set-cookie" in refused.headers) == (401, False)
            assert token not in refused.text or not token

    def test_a_key_opens_them_too(self, browser: TestClient, database: SyncDatabase) -> None:
        key = new_key(database, new_project(database, "tenant"))
        assert browser.get("/openapi.json", headers=bearer(key)).status_code == 200


class TestFiles:
    """What a server shows of its token, and for how long."""

    def settings(self, folder: Path, **more: object) -> Settings:
        return Settings(data_dir=folder / "data", auth_required=False).model_copy(update=more)

    def test_they_are_for_the_owners_eyes_alone_and_go_with_the_server(self, tmp_path: Path) -> None:
        before = os.umask(0)  # whatever the user's own is
        try:
            with bound("127.0.0.1", 0) as socket, admitted(self.settings(tmp_path), socket) as known:
                port = socket.getsockname()[1]
                files = [tmp_path / "data" / "token", own_folder() / f"127.0.0.1-{port}"]
                for file in files:
                    assert file.read_text().strip() == known.token.get_secret_value()
                    assert mode(file) == 0o600
                assert mode(own_folder()) == mode(own_folder().parent) == 0o700
            assert not any(file.exists() for file in files)
        finally:
            os.umask(before)

    def test_each_start_has_another_token(self, tmp_path: Path) -> None:
        made = set()
        for _ in range(2):
            with bound("127.0.0.1", 0) as socket, admitted(self.settings(tmp_path), socket) as known:
                made.add(known.token.get_secret_value())
        assert len(made) == 2

    def test_where_keys_alone_count_there_is_none(self, tmp_path: Path) -> None:
        keyed = self.settings(tmp_path, auth_required=True)
        with bound("127.0.0.1", 0) as socket, admitted(keyed, socket) as known:
            assert known.token.get_secret_value() == ""
            assert not (tmp_path / "data").exists()

    def test_an_operators_own_token_has_to_be_one(self, tmp_path: Path) -> None:
        weak = self.settings(tmp_path, token=SecretStr("hunter2"))
        with (
            bound("127.0.0.1", 0) as socket,
            pytest.raises(Exposed, match="ORTHOKV_TOKEN is not a token"),
            admitted(weak, socket),
        ):
            pass

    def test_what_a_killed_server_left_is_swept(self, tmp_path: Path) -> None:
        stale = own_folder() / "127.0.0.1-1"
        stale.write_text(generate_token())
        with bound("127.0.0.1", 0) as socket, admitted(self.settings(tmp_path), socket):
            living = own_folder() / f"127.0.0.1-{socket.getsockname()[1]}"
            own_folder()
            assert (stale.exists(), living.exists()) == (False, True)

    def test_server_and_client_look_in_the_same_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert own_folder() == _folder()
        for state in ("", "relative"):
            monkeypatch.setenv("XDG_STATE_HOME", state)
            monkeypatch.setenv("HOME", "/tmp/orthokv-home")
            assert _folder() == Path("/tmp/orthokv-home/.local/state/orthokv/servers")


class TestClientOfTheSameUser:
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        with Server(tmp_path_factory.mktemp("owner") / "data", {}) as server:
            yield server

    def test_python_finds_the_token_by_itself(self, server: Server) -> None:
        with OrthoKV(server.url) as client:
            assert list(client.jobs.list()) == []
        with OrthoKV(server.url.replace("127.0.0.1", "localhost")) as client:
            assert list(client.jobs.list()) == []

    def test_the_command_line_does(self, server: Server) -> None:
        done = CliRunner().invoke(jobs, ["list", "--url", server.url])
        assert (done.exit_code, done.output) == (0, "")

    def test_it_goes_on_with_a_server_that_was_started_again(self, tmp_path: Path) -> None:
        settings = Settings(data_dir=tmp_path / "data", auth_required=False)
        with bound("127.0.0.1", 0) as socket:
            url = f"http://localhost:{socket.getsockname()[1]}"
            auth = own_token(url)
            assert auth is not None
            for _ in range(2):
                with admitted(settings, socket) as known:
                    sent = next(auth.auth_flow(httpx2.Request("GET", url)))
                assert sent.headers["Authorization"] == f"Bearer {known.token.get_secret_value()}"
                # To the very address whose server has it: another user may listen on the other one.
                assert (sent.url.host, sent.headers["Host"]) == ("127.0.0.1", url.removeprefix("http://"))
            assert "Authorization" not in next(auth.auth_flow(httpx2.Request("GET", url))).headers

    def test_who_took_the_port_of_a_dead_server_does_not_see_its_token(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that nobody holds locked is of no living server."""
        with serving(settings) as url:
            address = url.removeprefix("http://").replace(":", "-")
            file = own_folder() / address
            file.write_text(f"{TOKEN}\n")
            with OrthoKV(url) as client, pytest.raises(Unauthenticated, match="token of this server's owner"):
                client.jobs.get("job_" + "0" * 26)
            monkeypatch.setenv("ORTHOKV_TOKEN", TOKEN)
            with OrthoKV(url) as client:
                assert list(client.jobs.list()) == []
            file.unlink()

    def test_the_token_is_not_sent_to_other_machines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ORTHOKV_TOKEN", TOKEN)
        for url in ("http://kv.example.com:8000", "http://localhost.example.com", "http://10.0.0.1"):
            with OrthoKV(url) as client:
                assert client.settings.own_token is None

    def test_a_key_goes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ORTHOKV_TOKEN", TOKEN)
        with OrthoKV("http://127.0.0.1:9", api_key="okv_0_secret_0") as client:
            assert client.settings.own_token is None

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(None, "there is no such file"), ("hunter2", "it holds no token"), ("ä", "it holds no token")],
    )
    def test_a_file_that_tells_none_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, reason: str
    ) -> None:
        file = tmp_path / "token"
        if content is not None:
            file.write_text(content)
        monkeypatch.setenv("ORTHOKV_TOKEN_FILE", str(file))
        done = CliRunner().invoke(jobs, ["list", "--url", "http://127.0.0.1:9"])
        assert done.exit_code == 2
        assert done.stderr == f"orthokv: cannot read the server's token from {file}: {reason}\n"
        with OrthoKV("http://127.0.0.1:9") as client, pytest.raises(TokenUnreadable):
            list(client.jobs.list())

    def test_a_file_that_this_user_may_not_read_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "folder").mkdir()
        monkeypatch.setenv("ORTHOKV_TOKEN_FILE", str(tmp_path / "folder"))  # nobody may read one as a file
        done = CliRunner().invoke(jobs, ["list", "--url", "http://127.0.0.1:9"])
        assert done.exit_code == 2
        assert done.stderr.startswith(f"orthokv: cannot read the server's token from {tmp_path / 'folder'}: ")
        assert len(done.stderr.splitlines()) == 1

    def test_a_variable_that_holds_none_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ORTHOKV_TOKEN", "hunter2")
        done = CliRunner().invoke(jobs, ["list", "--url", "http://127.0.0.1:9"])
        assert done.exit_code == 2
        assert "ORTHOKV_TOKEN holds no token" in done.stderr
        assert "hunter2" not in done.output


class TestServe:
    def test_the_address_with_the_token_is_for_a_terminal_alone(self, tmp_path: Path) -> None:
        with Server(tmp_path / "data", {}) as server:
            token = server.headers["Authorization"].split()[1]
            assert server.process.stdout is not None
            said = server.process.stdout.readline()
            assert said == f"Its pages: {server.url}/docs?token=..., with the token of {server.data}/token\n"
            assert httpx2.get(f"{server.url}/docs", params={"token": token}).status_code == 303
            assert httpx2.get(f"{server.url}/docs").status_code == 401
        terminal, end = os.openpty()
        command = [sys.executable, "-c", "import typer, app.cli; typer.run(app.cli.serve)"]
        with subprocess.Popen(
            [*command, "--data", str(tmp_path / "data"), "--port", "0", "--no-worker"],
            stdout=end,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
        ) as process:
            with os.fdopen(terminal) as lines:
                address = lines.readline().split()[-1]
                shown = lines.readline().split()[-1]
                token = (tmp_path / "data" / "token").read_text().strip()
                assert shown == f"{address}/docs?token={token}"
                process.terminate()
                process.wait(60)
            os.close(end)
        assert not (tmp_path / "data" / "token").exists()

    def test_a_weak_token_keeps_it_from_starting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ORTHOKV_TOKEN", "hunter2")
        refused = serve("--data", str(tmp_path / "data"), "--port", "0", "--no-worker")
        assert refused.returncode == 2
        assert "ORTHOKV_TOKEN is not a token as servers make them" in refused.stderr
        assert "hunter2" not in refused.stderr

    def test_a_request_without_it_is_told_what_is_needed(self, tmp_path: Path) -> None:
        with Server(tmp_path / "data", {}) as server:
            answer = httpx2.post(f"{server.url}/v1/jobs", json=job_body())
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
            assert "token of this server's owner" in answer.json()["detail"]
