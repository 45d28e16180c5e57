"""Another user of the machine, beside a real server of ours: he reads no byte of it, neither in files nor over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.main import create_app
from app.settings import Settings
from orthokv_client import OrthoKV
from tests.service.auth.test_auth_walk import IDS
from tests.support.factories import Script, job_body
from tests.support.orthokv_server import Server, until
from tests.support.paths import SCRIPTED_RUNNER
from tests.support.tenants import PROBES, operations

CANARY = b"a-word-that-only-the-owner-knows"

# What the other user runs: nothing of ours, in a Python of the machine. It tries what its input names, and tells what it got.
SPY = r"""
import json, os, sys, urllib.error, urllib.request

asked = json.load(sys.stdin)
found = {"user": os.geteuid(), "read": [], "listed": [], "answers": []}
for folder in asked["folders"]:
    for place, folders, files in os.walk(folder):
        found["listed"].append(place)
        for path in (os.path.join(place, name) for name in files):
            try:
                with open(path, "rb") as file:
                    file.read(1)
                found["read"].append(path)
            except OSError:
                pass
for path in asked["paths"]:
    try:
        with open(path, "rb") as file:
            file.read(1)
        found["read"].append(path)
    except OSError:
        pass
for method, url, body in asked["requests"]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            found["answers"].append([answer.status, answer.headers["Content-Type"], answer.read().decode()])
    except urllib.error.HTTPError as error:
        found["answers"].append([error.code, error.headers["Content-Type"], error.read().decode()])
json.dump(found, sys.stdout)
"""


def as_nobody(asked: dict[str, Any]) -> dict[str, Any]:
    """What `nobody` gets of it."""
    python = next(
        path for path in ("/usr/bin/python3", shutil.which("python3")) if path and Path(path).exists()
    )
    command = ["runuser", "-u", "nobody", "--", python, "-I", "-c", SPY]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, timeout=120, check=False, cwd="/"
    )
    if done.returncode:
        pytest.skip(f"this machine's Python does not run as nobody: {done.stderr[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["user"] != os.geteuid()
    return found


@dataclass(frozen=True)
class Place:
    """A folder that everybody may enter, with a server's data in it: only the modes of what is inside keep others out."""

    folder: Path
    server: Server
    script: Script

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def ask(self, *requests: tuple[str, str, Any]) -> list[Any]:
        sent = [(method, self.server.url + path, body) for method, path, body in requests]
        answers: list[Any] = as_nobody({"folders": [], "paths": [], "requests": sent})["answers"]
        return answers


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user: run the tests as root to have this one")
    if shutil.which("runuser") is None:
        pytest.skip("there is no `runuser` here to act as another user with")
    before = os.umask(0o022)  # the usual one
    folder = Path(tempfile.mkdtemp(prefix="orthokv-other-user-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        (folder / "public").write_text("for everybody")
        model = folder / "model"
        model.mkdir(mode=0o700)
        for name in ("config.json", "model.safetensors"):
            (model / name).write_bytes(CANARY)
        script = Script(folder / "script")
        script.folder.chmod(0o700)
        environment = {
            "ORTHOKV_RUNNER_COMMAND": json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)]),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        with pytest.MonkeyPatch.context() as patch, Server(folder / "data", environment) as server:
            patch.setenv("XDG_STATE_HOME", str(folder / "state"))
            yield Place(folder, server, script)
    finally:
        shutil.rmtree(folder)
        os.umask(before)


@pytest.fixture(scope="module")
def ids(place: Place) -> dict[str, str]:
    """One of everything, made by the owner: a job over a private model and a private text, at its end."""
    text = place.folder / "private.txt"
    text.touch(mode=0o600)
    text.write_bytes(CANARY)
    with OrthoKV(place.server.url) as client:
        dataset = client.datasets.upload(text)
        body = job_body(model={"id": str(place.model)}, dataset={"id": dataset.id}, form="full")
        job = client.jobs.wait(client.jobs.create(body).id)
        assert job.result is not None
        assert job.result.checkpoint_id is not None
        assert job.result.profile_id is not None
        files = client.checkpoints.files(job.result.checkpoint_id).data
    return {
        "job_id": job.id,
        "dataset_id": dataset.id,
        "profile_id": job.result.profile_id,
        "checkpoint_id": job.result.checkpoint_id,
        "artifact_id": files[0].id,
    }


def test_he_reads_no_file_of_ours_at_rest_or_at_work(place: Place, ids: dict[str, str]) -> None:
    place.script.write({"step": "calibrate", "run": 0, "do": "hang_until_released"})
    (place.script.folder / "runs.jsonl").unlink()
    job_id = place.server.post("/v1/jobs", job_body(dataset={"id": ids["dataset_id"]}))["id"]
    until(lambda: place.script.is_hanging("calibrate"), "a step is at work")
    ours = [str(path) for path in place.folder.rglob("*") if path.is_file()]
    assert any(CANARY in Path(path).read_bytes() for path in ours if "/objects/" in path)
    assert any("/work/" in path for path in ours)
    assert any(path.endswith("orthokv.db-wal") for path in ours)
    # By walking, and by names that he may have learned elsewhere.
    found = as_nobody({"folders": [str(place.folder)], "paths": ours, "requests": []})
    public = str(place.folder / "public")
    log = str(place.server.log_file)  # what a shell does with the output is its user's
    assert set(found["read"]) - {log} == {public}, "he reads what is for everybody, and nothing else"
    private = ("data", "model", "script", "state")
    entered = {Path(path).relative_to(place.folder).parts[:1] for path in found["listed"]}
    assert entered.isdisjoint({(name,) for name in private})
    place.script.go_on()
    place.server.wait_for_end(job_id)


def test_he_gets_no_answer_but_that_the_server_is_well(place: Place, ids: dict[str, str]) -> None:
    api = create_app(Settings())
    asked = [
        (operation.method, re.sub(r"\{(\w+)\}", lambda one: known(one[1], ids), operation.path), None)
        for operation in operations(api)
        if operation.method not in ("HEAD", "OPTIONS")
    ]
    assert len(asked) > 30
    for (method, path, _), (status, kind, text) in zip(asked, place.ask(*asked), strict=True):
        if path in PROBES:
            assert status == 200
            continue
        assert (status, kind) == (401, "application/problem+json"), f"{method} {path}"
        assert json.loads(text)["code"] == "unauthenticated"
        assert CANARY.decode() not in text


def known(parameter: str, ids: dict[str, str]) -> str:
    return ids.get(parameter, f"{IDS[parameter]}_{'0' * 26}")


def test_he_has_no_job_over_a_folder_that_he_cannot_read(place: Place, ids: dict[str, str]) -> None:
    """The way by which weights once left a folder of mode 0700."""
    before = place.server.get("/v1/jobs")
    bodies = [
        job_body(model={"id": str(folder)}, form="full") for folder in (place.model, place.folder / "none")
    ]
    asked = [("POST", path, body) for path in ("/v1/jobs", "/v1/jobs:validate") for body in bodies]
    answers = place.ask(*asked)
    assert {status for status, _, _ in answers} == {401}
    assert len({re.sub(r"req_\w+|/v1/jobs(:validate)?", "", text) for _, _, text in answers}) == 1
    assert place.server.get("/v1/jobs") == before


def test_the_token_is_in_no_list_of_processes(place: Place, ids: dict[str, str]) -> None:
    token = place.server.headers["Authorization"].split("_")[2]
    family = [psutil.Process(place.server.process.pid), *place.server.family()]
    assert len(family) > 1
    assert not any(token in part for process in family for part in process.cmdline())
    files = [
        f"/proc/{process.pid}/{name}" for process in family for name in ("environ", "mem", "maps", "fd/1")
    ]
    assert as_nobody({"folders": [], "paths": files, "requests": []})["read"] == []
    assert token not in place.server.log()
