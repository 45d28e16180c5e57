"""Keys from the command line, servers that need them, and what must never show one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner, Result

from app.auth.exposure import is_loopback
from app.infra.ids import new_id
from app.infra.keys import generate, key_id_of
from app.projects.cli import keys
from orthokv_client.cli import jobs
from tests.service.cli.test_cli import serve
from tests.support.factories import Script, job_body
from tests.support.orthokv_server import Server
from tests.support.paths import REPOSITORY, SCRIPTED_RUNNER
from tests.support.tenants import bearer

PEPPER = "a-pepper-that-nobody-sees"


def run_keys(data: Path, *arguments: str, pepper: str = PEPPER) -> Result:
    environment = {"ORTHOKV_DATA_DIR": str(data), "ORTHOKV_KEY_PEPPER": pepper}
    return CliRunner().invoke(keys, list(arguments), env=environment)


def run_jobs(server: Server, *arguments: str, key: str | None) -> Result:
    environment = {"ORTHOKV_URL": server.url, "ORTHOKV_API_KEY": key}
    return CliRunner().invoke(jobs, list(arguments), env=environment)


def make_key(data: Path, *arguments: str) -> str:
    done = run_keys(data, "create", *arguments)
    assert done.exit_code == 0, done.output
    key = done.stdout.strip()
    assert key_id_of(key) is not None
    return key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that needs keys."""
    script = Script(tmp_path_factory.mktemp("script") / "script")
    environment = {
        "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
        "ORTHOKV_AUTH_REQUIRED": "true",
        "ORTHOKV_KEY_PEPPER": PEPPER,
    }
    with Server(tmp_path_factory.mktemp("serve") / "data", environment) as server:
        yield server


SUBMIT = ("submit", "--model", "org/model", "--dataset", "self", "--kept", "0.25", "--num-samples", "4")


class TestKeys:
    @pytest.mark.parametrize("command", [("list",), ("revoke", "key_0"), ("create", "--scope", "admin")])
    def test_a_database_that_is_away_is_one_line(self, command: tuple[str, ...]) -> None:
        url = "postgresql://nobody:secret@127.0.0.1:9/nothing"
        done = CliRunner().invoke(keys, list(command), env={"ORTHOKV_DATABASE_URL": url})
        assert done.exit_code == 2, done.output
        assert "127.0.0.1:9/nothing cannot be used" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "secret" not in done.output

    def test_the_first_key_of_a_fresh_folder_and_its_end(self, tmp_path: Path) -> None:
        done = run_keys(tmp_path / "data", "create", "--scope", "jobs:read", "--scope", "jobs:write")
        key = done.stdout.strip()
        assert (done.exit_code, done.stdout.count("\n")) == (0, 1)
        assert key not in done.stderr
        key_id = key_id_of(key)
        assert key_id is not None
        listed = run_keys(tmp_path / "data", "list").stdout
        assert f"{key_id}  default  cli  jobs:read,jobs:write  expires never" in listed
        assert run_keys(tmp_path / "data", "revoke", key_id).exit_code == 0
        assert "revoked" in run_keys(tmp_path / "data", "list").stdout

    def test_a_project_is_made_only_when_asked_for(self, tmp_path: Path) -> None:
        wanted = ("create", "--project", "acme", "--scope", "jobs:read")
        refused = run_keys(tmp_path, *wanted)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert "there is no project 'acme'; --new-project makes it" in refused.stderr
        assert run_keys(tmp_path, *wanted, "--new-project").exit_code == 0
        assert run_keys(tmp_path, *wanted).exit_code == 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("create", "--scope", "everything"), "everything"),
            (("create",), "--scope"),
            (("create", "--scope", "jobs:read", "--project", "Not A Name", "--new-project"), "name: "),
            (("revoke", "key_" + "0" * 26), "No such API key"),
        ],
    )
    def test_bad_input_is_exit_code_2(self, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
        done = run_keys(tmp_path, *arguments)
        assert done.exit_code == 2
        assert message in done.stderr

    def test_a_folder_that_is_none(self, tmp_path: Path) -> None:
        done = run_keys(tmp_path / "nowhere", "list")
        assert done.exit_code == 2
        assert "is not a data folder" in done.stderr
        assert not (tmp_path / "nowhere").exists()


class TestJobsWithAKey:
    def test_the_key_comes_from_the_environment_or_a_file(self, server: Server, tmp_path: Path) -> None:
        key = make_key(
            server.data,
            *("--scope", "jobs:read", "--scope", "jobs:write", "--scope", "checkpoints:read"),
            *("--scope", "artifacts:read"),
        )
        done = run_jobs(server, *SUBMIT, "--wait", key=key)
        assert done.exit_code == 0, done.output
        job_id = done.stdout.splitlines()[0]
        file = tmp_path / "key"
        file.write_text(key + "\n")
        fetched = run_jobs(
            server, "download", job_id, "--out", str(tmp_path / "out"), "--api-key-file", str(file), key=None
        )
        assert fetched.exit_code == 0, fetched.output
        assert (tmp_path / "out" / "orthokv.json").is_file()

    def test_refusals_are_one_line_and_exit_code_2(self, server: Server, tmp_path: Path) -> None:
        small = make_key(server.data, "--scope", "jobs:read")
        nobody = generate(new_id("key"))
        empty = tmp_path / "empty"
        empty.touch()
        for result, message in (
            (run_jobs(server, "list", key=None), "An API key is needed"),
            (run_jobs(server, "list", key=nobody), "This API key is not valid"),
            (run_jobs(server, *SUBMIT, key=small), "lacks the scope 'jobs:write'"),
            (run_jobs(server, "list", key="hunter2"), "ORTHOKV_API_KEY holds no API key"),
            (run_jobs(server, "list", "--api-key-file", str(empty), key=small), "holds no API key"),
            (run_jobs(server, "list", "--api-key-file", str(tmp_path), key=small), "cannot read a key"),
        ):
            assert result.exit_code == 2, result.output
            assert message in result.stderr
            assert len(result.stderr.splitlines()) == 1
            assert not any(secret in result.output for secret in (small, nobody, "hunter2"))


def canaries(server: Server) -> tuple[str, str, list[str]]:
    """A key made by the command line, one made over HTTP, and everything that was said meanwhile."""
    said: list[str] = []
    admin = make_key(server.data, "--scope", "admin")
    made = httpx2.post(
        f"{server.url}/v1/api_keys", json={"name": "n", "scopes": ["admin"]}, headers=bearer(admin)
    )
    other = made.json()["key"]
    for key in (admin, other):
        said += [
            run_jobs(server, *SUBMIT, "--wait", key=key).output,
            run_jobs(server, "list", key=key).output,
        ]
        said.append(run_jobs(server, "watch", "job_1", key=key).output)
        for method, path, body in (
            ("GET", "/v1/api_keys", None),
            ("GET", "/v1/audit_events", None),
            ("GET", "/v1/jobs", None),
            ("GET", f"/v1/jobs/{key}", None),  # a key in the wrong place
            ("GET", f"/v1/jobs?after={key[:40]}&status={key}", None),
            ("POST", "/v1/jobs", job_body(model={"id": key, "revision": {"x": key}})),
            ("POST", "/v1/jobs", {key: key}),
            ("DELETE", f"/v1/api_keys/{key}", None),
            ("GET", f"/{key}", None),
        ):
            answer = httpx2.request(method, server.url + path, json=body, headers=bearer(key))
            said.append(answer.text)
            said.append(str(answer.headers))
        said.append(httpx2.get(f"{server.url}/v1/jobs", headers=bearer(key[:-1])).text)
    said.append(run_keys(server.data, "list").output)
    return admin, other, said


def test_no_output_and_no_file_holds_a_key(server: Server) -> None:
    admin, other, said = canaries(server)
    said.append(server.log())
    files = [path for path in server.data.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    stored = b"\n".join(path.read_bytes() for path in files)
    for key in (admin, other):
        secret = key.split("_")[2]
        assert key.split("_")[1].encode() in stored  # the row is there: the search would find something
        assert secret.encode() not in stored
        assert [text for text in said if secret in text] == []
    assert PEPPER.encode() not in stored
    assert not any(PEPPER in text for text in said)


def test_the_log_cuts_keys_out_of_whatever_it_is_given() -> None:
    key = generate(new_id("key"))
    code = (
        "import os, structlog; from app.infra.logs import configure; configure(); log = structlog.get_logger()\n"
        "key = os.environ['KEY']\n"
        "log.info('said ' + key, header=f'Bearer {key}')\n"
        "try:\n    raise RuntimeError(key)\nexcept RuntimeError:\n    log.exception('failed')\n"
    )
    environment = {**os.environ, "KEY": key}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=REPOSITORY,
        check=True,
    )
    assert key.split("_")[2] not in done.stderr
    assert done.stderr.count("[redacted]") >= 3


class TestExposure:
    @pytest.mark.parametrize(
        ("host", "ours"),
        [
            ("127.0.0.1", True),
            ("127.9.9.9", True),
            ("::1", True),
            ("[::1]", True),
            ("localhost", True),
            ("0.0.0.0", False),
            ("::", False),
            ("10.0.0.1", False),
            ("localhost.example.com", False),
            ("::ffff:10.0.0.1", False),
            ("", False),
        ],
    )
    def test_what_the_loopback_is(self, host: str, ours: bool) -> None:
        assert is_loopback(host) is ours

    @pytest.mark.parametrize(
        ("arguments", "environment"),
        [
            (("--host", "0.0.0.0"), {"ORTHOKV_AUTH_REQUIRED": "false"}),
            ((), {"ORTHOKV_AUTH_REQUIRED": "false", "ORTHOKV_ALLOWED_HOSTS": '["kv.example.com"]'}),
            (("--host", "0.0.0.0"), {}),
            ((), {"ORTHOKV_ALLOWED_HOSTS": '["kv.example.com"]'}),
        ],
    )
    def test_others_are_not_let_in_without_keys(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: tuple[str, ...],
        environment: dict[str, str],
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        refused = serve("--data", str(tmp_path / "data"), "--port", "0", *arguments)
        assert refused.returncode == 2
        assert "is not a loopback address" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert refused.stdout == ""

    def test_with_a_key_a_server_is_open_to_others(self, tmp_path: Path) -> None:
        key = make_key(tmp_path / "data", "--scope", "jobs:read")
        environment = {
            "ORTHOKV_ALLOWED_HOSTS": '["127.0.0.1", "kv.example.com"]',
            "ORTHOKV_KEY_PEPPER": PEPPER,
        }
        with Server(tmp_path / "data", environment) as server:
            named = {"Host": "kv.example.com"}
            assert httpx2.get(f"{server.url}/v1/jobs", headers=named).status_code == 401
            assert httpx2.get(f"{server.url}/v1/jobs", headers={**named, **bearer(key)}).status_code == 200

    def test_a_local_server_says_that_it_asks_for_its_owner(self, tmp_path: Path) -> None:
        with Server(tmp_path / "data", {}) as server:
            assert httpx2.get(f"{server.url}/v1/jobs").status_code == 401
            assert httpx2.get(f"{server.url}/v1/jobs", headers=server.headers).status_code == 200
            assert "auth.owner" in server.log()
