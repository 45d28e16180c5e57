"""`orthokv serve` and `orthokv jobs` against a real server, whose runner follows a script."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from app.jobs.vocabulary import JobErrorCode
from orthokv_client.cli import _exit_code, jobs
from orthokv_client.models import Job, JobError, JobProgress
from orthokv_client.partfile import PartFile
from orthokv_client.watch import show
from tests.support.factories import Script
from tests.support.orthokv_server import Server, until
from tests.support.paths import DEMO, REPOSITORY, SCRIPTED_RUNNER


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script") / "script")


@pytest.fixture(scope="module")
def server(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = json.dumps([sys.executable, str(SCRIPTED_RUNNER), str(script.folder)])
    with Server(tmp_path_factory.mktemp("serve") / "data", {"ORTHOKV_RUNNER_COMMAND": command}) as server:
        yield server


@pytest.fixture(autouse=True)
def _calm(script: Script) -> None:
    script.write()
    (script.folder / "runs.jsonl").unlink(missing_ok=True)


def orthokv(server: Server, *arguments: str) -> Result:
    return CliRunner().invoke(jobs, list(arguments), env={"ORTHOKV_URL": server.url})


def submit(server: Server, *more: str) -> Result:
    return orthokv(server, "submit", "--model", "org/model", "--dataset", "self", "--kept", "0.25", *more)


def test_submit_wait_and_download(server: Server, tmp_path: Path) -> None:
    done = submit(server, "--wait", "--num-samples", "4")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("job_")
    assert "kept 0.2499, perplexity 11.5" in done.stdout
    out, profile = tmp_path / "out", tmp_path / "profile"
    fetched = orthokv(server, "download", lines[0], "--out", str(out), "--profile", str(profile))
    assert fetched.exit_code == 0, fetched.output
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "orthokv.json",
        "orthokv.safetensors",
    ]
    assert (out / "SHA256SUMS").read_bytes() == b"second\n"
    assert sorted(path.name for path in profile.iterdir()) == [
        "profile.json",
        "profile.png",
        "profile.safetensors",
    ]


def test_validate_says_what_a_job_would_take_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    before = server.get("/v1/usage")
    text = tmp_path / "text.txt"
    text.write_text("some text")
    options = (
        "--model",
        str(DEMO),
        "--dataset",
        str(text),
        "--kept",
        "0.25",
    )
    done = orthokv(server, "validate", *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("estimate: ")
    assert "GPU memory 0." in done.stdout
    assert server.get("/v1/usage") == before
    refused = orthokv(server, "validate", *options[:3], "self", *options[4:], "--model", str(tmp_path))
    assert refused.exit_code == 2
    assert "The model's folder has no config.json" in refused.output
    assert server.get("/v1/usage") == before


def test_submit_prints_the_estimate_beside_the_id(server: Server) -> None:
    sent = submit(server, "--wait")
    assert sent.stderr.startswith("estimate: unknown")
    assert sent.stdout.startswith("job_")


def test_a_download_resumes_and_a_damaged_one_is_not_kept(server: Server, tmp_path: Path) -> None:
    job_id = submit(server, "--wait").stdout.splitlines()[0]
    found = server.job(job_id)["result"]["checkpoint_id"]
    files = {file["filename"]: file for file in server.get(f"/v1/checkpoints/{found}/files")["data"]}
    file = files["orthokv.safetensors"]
    assert orthokv(server, "download", job_id, "--out", str(tmp_path)).exit_code == 0
    target = tmp_path / file["filename"]
    whole = target.read_bytes()

    def broken_off_after(begin: bytes) -> Path:
        target.unlink(missing_ok=True)
        with PartFile(target, size=file["bytes"], sha256=file["sha256"]) as part:
            part.reserve()
            part.write(0, begin)
            part.count(0)
        return part.path

    part = broken_off_after(whole[:10])
    assert orthokv(server, "download", job_id, "--out", str(tmp_path)).exit_code == 0
    assert (target.read_bytes(), part.exists()) == (whole, False)

    broken_off_after(b"\0" * 10)  # the beginning of something else: only a true resume makes this wrong
    damaged = orthokv(server, "download", job_id, "--out", str(tmp_path))
    assert damaged.exit_code == 1
    assert "arrived damaged" in damaged.stderr
    assert not target.exists()
    assert orthokv(server, "download", job_id, "--out", str(tmp_path)).exit_code == 0
    assert hashlib.sha256(target.read_bytes()).hexdigest() == file["sha256"]


def test_dataset_files_are_uploaded_and_mixed(server: Server, script: Script, tmp_path: Path) -> None:
    text, more = tmp_path / "calibration.jsonl", tmp_path / "more.txt"
    text.write_text('{"body": "text"}\n')
    more.write_text("other text")
    done = orthokv(
        server,
        *("submit", "--model", "org/model", "--dataset", str(text), "--field", "body"),
        *("--dataset", str(more), "--dataset", "self", "--rank-multiple", "16"),
        *("--layer-error", "0.1", "--form", "full", "--refine-steps", "3", "--polish-steps", "0", "--wait"),
        *("--key-mode", "post", "--positions", "4096"),
    )
    assert done.exit_code == 0, done.output
    request = script.runs("calibrate")[0]["request"]
    first, second, third = request["dataset"]
    assert (first["format"], first["field"]) == ("jsonl", "body")
    assert (second["format"], Path(second["source"]).name) == ("text", "dataset-1.text")
    assert third["source"] == "self"
    target = request["target"]
    assert (request["settings"]["refine_steps"], target["grid"]["multiple"]) == (3, 16)
    assert target["polish_steps"] == 0
    assert (request["settings"]["key_mode"], request["settings"]["positions"]) == ("post", 4096)
    assert (target["budget"], target["form"]) == ({"metric": "layer_error", "value": 0.1}, "full")


def test_a_local_model_is_sent_as_an_absolute_folder(server: Server, script: Script, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    done = orthokv(server, "submit", "--model", str(folder), "--dataset", "self", "--kept", "0.5", "--wait")
    assert done.exit_code == 0, done.output
    assert script.runs("resolve")[0]["request"]["model"]["id"] == str(folder.resolve())


def test_a_budget_out_of_reach_is_exit_code_3(server: Server, script: Script) -> None:
    script.write({"step": "package", "run": 0, "do": "unreachable"})
    done = submit(server, "--wait")
    assert done.exit_code == 3
    assert "best reached: 0.07" in done.stderr


def test_a_job_whose_input_turns_out_bad_is_exit_code_2(server: Server, script: Script) -> None:
    script.write({"step": "resolve", "run": 0, "do": "user_error"})
    done = submit(server, "--wait")
    assert done.exit_code == 2
    assert "model_unsupported: Architecture Foo is not supported." in done.stderr


def test_only_failures_that_are_not_the_inputs_are_exit_code_1() -> None:
    """Every code of the vocabulary is on one side or the other: a new one has to be thought about."""
    rest = {"message": "", "retryable": False, "phase": "", "layer": None, "attempt": 1, "best": None}
    errors = {code: JobError.model_validate({"code": code.value, **rest}) for code in JobErrorCode}
    codes = {code: _exit_code(error) for code, error in errors.items()}
    assert {code.value for code, exit_code in codes.items() if exit_code == 1} == {
        "storage_error",
        "out_of_memory",
        "step_timeout",
        "time_limit_exceeded",
        "worker_lost",
        "internal",
    }
    assert codes[JobErrorCode.BUDGET_UNREACHABLE] == 3


def test_waiting_says_what_came_of_a_job_and_retry_opens_it_again(server: Server, script: Script) -> None:
    script.write({"step": "resolve", "run": 0, "do": "user_error"})
    job_id = submit(server).stdout.strip()
    assert orthokv(server, "wait", job_id).exit_code == 2
    assert orthokv(server, "retry", job_id).stdout.strip() == "queued"
    done = orthokv(server, "wait", job_id)
    assert (done.exit_code, done.stdout.splitlines()[0].split(":")[0]) == (0, f"{job_id} succeeded")


def test_waiting_ends_with_its_time(server: Server, script: Script) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "hang"})
    job_id = submit(server).stdout.strip()
    done = orthokv(server, "wait", job_id, "--timeout", "0.2")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert f"{job_id} is still" in done.stderr
    orthokv(server, "cancel", job_id)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_seq_len": 256}, 256),
        ({"text_config": {"max_position_embeddings": 128}}, 128),
        ({"max_position_embeddings": 4096}, 1024),
        ({"max_position_embeddings": "many"}, 1024),
        ([], 1024),
        (None, 1024),
    ],
)
def test_samples_are_no_longer_than_the_models_context(
    server: Server, tmp_path: Path, config: object, length: int
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    done = orthokv(server, "submit", "--model", str(folder), "--dataset", "self", "--kept", "0.5")
    said = f"sequence length {length}: the model's longest context\n" if length < 1024 else ""
    assert (done.exit_code, done.stderr.partition("estimate: ")[0]) == (0, said)
    assert server.job(done.stdout.strip())["spec"]["dataset"]["sequence_length"] == length
    asked = orthokv(
        *(server, "submit", "--model", str(folder), "--dataset", "self", "--kept", "0.5"),
        *("--sequence-length", "64"),
    )
    assert "sequence length" not in asked.stderr
    assert server.job(asked.stdout.strip())["spec"]["dataset"]["sequence_length"] == 64
    for job_id in (done.stdout.strip(), asked.stdout.strip()):
        end(server, job_id)


def test_watch_list_and_cancel(server: Server, script: Script) -> None:
    script.write({"step": "calibrate", "run": 0, "do": "hang"})
    job_id = submit(server).stdout.strip()
    assert f"{job_id}  " in orthokv(server, "list", "--limit", "1").stdout
    assert orthokv(server, "cancel", job_id).stdout.strip() in ("cancelling", "cancelled")
    watched = orthokv(server, "watch", job_id)
    assert watched.exit_code == 1
    assert f"{job_id} cancelled" in watched.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "--model", "org/m", "--dataset", "self"], "exactly one of"),
        (
            ["submit", "--model", "org/m", "--dataset", "self", "--kept", "1", "--layer-error", "1"],
            "exactly one",
        ),
        (["submit", "--model", "org/m", "--dataset", "self", "--kept", "1.5"], "must be at most 1"),
        (["submit", "--model", "org/m", "--dataset", "nowhere.jsonl", "--kept", "1"], "is not a file"),
        (["submit", "--model", "./nowhere", "--dataset", "self", "--kept", "1"], "is not a folder"),
        (["watch", "job_1"], "does not fit"),
        (["cancel", "job_" + "0" * 26], "No such job"),
        (["download", "job_" + "0" * 26, "--out", "x"], "No such job"),
        (["download", "job_" + "0" * 26], "say where to"),
        (["list", "--url", "foo"], "is not the URL of a server"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(server: Server, arguments: list[str], message: str) -> None:
    done = orthokv(server, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def end(server: Server, job_id: str) -> None:
    """What is left in the queue would run by the script of a later test."""
    orthokv(server, "cancel", job_id)
    until(lambda: server.job(job_id)["status"] in ("succeeded", "failed", "cancelled"), "the job ends")


def python_examples(document: str) -> list[str]:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "orthokv_client" in block]


@pytest.mark.parametrize(("document", "examples"), [("docs/service.md", 2), ("clients/python/README.md", 1)])
def test_the_documents_examples_run_as_they_stand(
    server: Server, tmp_path: Path, document: str, examples: int
) -> None:
    """Pasted into files, in a folder with a calibration file; one names its server, so that is replaced."""
    (tmp_path / "calibration.txt").write_text("some text")
    (tmp_path / "demo").symlink_to(REPOSITORY / "demo")
    found = python_examples(document)
    assert len(found) == examples
    for number, block in enumerate(found):
        (tmp_path / f"{number}.py").write_text(block.replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run(
            [sys.executable, f"{number}.py"],
            cwd=tmp_path,
            env={**os.environ, "ORTHOKV_URL": server.url},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint" / "orthokv.safetensors").is_file()


def test_no_server_is_exit_code_1() -> None:
    done = CliRunner().invoke(jobs, ["list", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "cannot reach http://127.0.0.1:9" in done.stderr


def serve(*arguments: str, database: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import typer, app.cli; typer.run(app.cli.serve)", *arguments]
    environment = {**os.environ, "ORTHOKV_DATABASE_URL": database}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False, env=environment
    )


def test_a_second_server_refuses_the_folder(server: Server) -> None:
    second = serve("--data", str(server.data), "--port", "0")
    assert second.returncode == 2
    assert "another OrthoKV server uses" in second.stderr


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://root@127.0.0.1/x", "database 'mysql' is not supported"),
        ("postgresql://nobody:secret@127.0.0.1:9/x", "127.0.0.1:9/x cannot be used"),
        ("sqlite:///{folder}/readme.txt", "file is not a database"),
    ],
)
def test_a_database_that_cannot_be_used_is_bad_input(tmp_path: Path, url: str, message: str) -> None:
    (tmp_path / "readme.txt").write_text(
        "not a database, though it is as long as the header of one would be\n" * 9
    )
    refused = serve("--data", str(tmp_path / "data"), database=url.format(folder=tmp_path))
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert "secret" not in refused.stderr


def test_a_server_stays_on_the_loopback(tmp_path: Path) -> None:
    refused = serve("--data", str(tmp_path / "data"), "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert "is not a loopback address, and there is no API key yet" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_bad_input(server: Server, tmp_path: Path) -> None:
    refused = serve("--data", str(tmp_path / "data"), "--port", server.url.rsplit(":", 1)[1])
    assert refused.returncode == 2
    assert "in use" in refused.stderr


def test_a_bar_shows_no_count_before_there_is_one_nor_that_of_the_phase_before() -> None:
    def state(status: str, phase: str, *progress: object) -> Job:
        counted = dict(zip(("done", "total", "unit"), progress, strict=False)) or None
        return Job.model_construct(
            status=status,
            phase=phase,
            progress=counted and JobProgress.model_construct(**counted, fraction=1.0),
        )

    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    states = [
        state("queued", "queued"),
        state("running", "fitting", 252, 252, "layers"),
        state("running", "packaging"),
        state("succeeded", "finished"),
    ]
    assert show(iter(states), terminal).phase == "finished"
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "None" not in shown
    last = shown[shown.rindex("finished") :]
    assert "252" not in last
