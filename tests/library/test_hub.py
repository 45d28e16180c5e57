"""A checkpoint is pushed whole, with its card and nothing else, and what was pushed loads and generates elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants

import orthokv
from orthokv.checkpoint.hub import prepare, push
from orthokv.checkpoint.write import record_measurements, write_checkpoint
from orthokv.cli import main
from orthokv.files.digests import SUMS, sums_of, verify_files
from orthokv.models.source import resolve_model
from orthokv.planning.allocate import allocate
from orthokv.planning.profile import PROFILE_JSON
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidCheckpoint, InvalidSetting, PushFailed
from orthokv.spec.names import CARD, CONFIG
from orthokv.spec.vocabulary import Form
from tests.support.hub import Hub, Repo, serve_hub
from tests.support.paths import REPOSITORY
from tests.support.tiny import tiny_folder, tiny_model, tiny_profile, tiny_tokens

pytestmark = pytest.mark.slow  # real processes, one after the other

REPO = "team/small-cache"
MEASURED = {
    "perplexity": 12.5,
    "perplexity_dense": 10.0,
    "kl": 0.0125,
    "kept": 0.5,
    "cache_bytes_per_token": 192.0,
    "cache_bytes_per_token_dense": 384.0,
    "tokens": 512,
    "dataset": {"source": "/home/someone/secret-place/eval.txt"},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "cache") as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield server


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="session")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Form], Path]:
    """A measured checkpoint of each form."""
    source = resolve_model(str(base))
    profile = tiny_profile(base)
    plan = allocate(profile, Budget("kept", 0.5))
    made: dict[Form, Path] = {}

    def write(form: Form) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form) / "checkpoint"
            write_checkpoint(profile, plan, made[form], form=form, base=source)
            record_measurements(made[form], MEASURED)
        return made[form]

    return write


@pytest.fixture
def adapter(written: Callable[[Form], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written("adapter"), tmp_path / "adapter"))


# --------------------------------------------------------------------------------------------- what is pushed


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_the_repository_is_the_checkpoint_and_sound(
    hub: Hub, written: Callable[[Form], Path], form: Form, tmp_path: Path
) -> None:
    folder = written(form)
    made = push(folder, REPO)
    repo = hub.repos[REPO]
    assert made.commit == repo.commit
    assert made.url == f"{hub.url}/{REPO}/commit/{repo.commit}"
    assert set(repo.files) == {path.name for path in folder.iterdir()} | {".gitattributes"}
    for name, data in repo.files.items():
        (tmp_path / name).write_bytes(data)
    verify_files(tmp_path)
    for path in folder.glob("*.safetensors"):
        assert repo.files[path.name] == path.read_bytes()
    assert len(hub.commits) == 1, "a reader never sees half of a checkpoint"


def test_large_files_go_to_the_store_and_small_ones_into_the_commit(hub: Hub, adapter: Path) -> None:
    push(adapter, REPO)
    assert len(hub.stored) == len(list(adapter.glob("*.safetensors")))
    assert sum("/store/" in path for method, path in hub.requests if method == "PUT") == len(hub.stored)


def test_pushed_again_unchanged_it_is_the_same_commit(hub: Hub, adapter: Path) -> None:
    first = push(adapter, REPO)
    assert push(adapter, REPO).commit == first.commit
    assert len(hub.commits) == 1
    record_measurements(adapter, {**MEASURED, "perplexity": 13.0})
    assert push(adapter, REPO).commit != first.commit
    assert [commit["repo"] for commit in hub.commits] == [REPO, REPO]


def test_a_branch_is_made_and_main_stays_as_it_is(hub: Hub, adapter: Path) -> None:
    made = push(adapter, REPO, revision="kept-50")
    assert set(hub.repos[REPO].files) == {".gitattributes"}
    assert hub.repos[REPO].others["kept-50"].commit == made.commit
    assert push(adapter, REPO, revision="kept-50").commit == made.commit


def test_the_repository_is_private_where_that_is_asked(hub: Hub, adapter: Path) -> None:
    push(adapter, REPO, private=True)
    push(adapter, "team/open")
    assert hub.repos[REPO].private
    assert not hub.repos["team/open"].private
    push(adapter, REPO, private=True)


def test_the_card_loads_the_repository_and_says_what_was_measured(hub: Hub, adapter: Path) -> None:
    push(adapter, REPO)
    card = hub.repos[REPO].files[CARD].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    assert "kv-cache" in front["tags"]
    assert f'orthokv.attach(model, "{REPO}")' in card
    measured = next(line for line in card.splitlines() if line.startswith("| perplexity "))
    assert [float(cell) for cell in measured.strip("| ").split("|")[1:]] == [12.5, 10.0]
    for part in ("## Quality", "bytes per token", "## Ranks", "## How it was made", "## Licence"):
        assert part in card


@pytest.mark.parametrize(("form", "relation"), [("adapter", "adapter"), ("full", "quantized")])
def test_the_card_names_a_base_of_the_hub(
    written: Callable[[Form], Path], form: Form, relation: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written(form), tmp_path / form))
    config = json.loads((folder / CONFIG).read_text())
    config["base_model"] |= {"id": "org/base", "revision": "0123abc"}
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / SUMS).write_text(sums_of(folder))
    card = prepare(folder, REPO).files[CARD]
    assert isinstance(card, bytes)
    front = yaml.safe_load(card.decode().split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("org/base", relation)


def test_no_path_of_this_machine_is_published(hub: Hub, adapter: Path, base: Path) -> None:
    assert str(base) in (adapter / CONFIG).read_text()
    assert str(base) in (adapter / PROFILE_JSON).read_text()
    push(adapter, REPO)
    for name, data in hub.repos[REPO].files.items():
        assert str(base.parent).encode() not in data, name
        assert b"secret-place" not in data, name


def test_the_folder_stays_as_it_was(hub: Hub, adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    push(adapter, REPO)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_file_that_is_not_of_the_checkpoint_is_not_sent(hub: Hub, adapter: Path) -> None:
    (adapter / ".env").write_text("SECRET=1")
    (adapter / "notes.txt").write_text("mine")
    push(adapter, REPO)
    assert not {".env", "notes.txt"} & set(hub.repos[REPO].files)


@pytest.mark.parametrize("name", ["model.py", "weights.bin", "../outside.json", "config.json", "a/b.json"])
def test_a_list_with_files_of_other_kinds_is_refused(hub: Hub, adapter: Path, name: str) -> None:
    with (adapter / SUMS).open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(InvalidCheckpoint, match="no file that a checkpoint may hold"):
        push(adapter, REPO)
    assert not hub.requests


def test_a_link_is_refused(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    (adapter / CARD).rename(tmp_path / "elsewhere")
    (adapter / CARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidCheckpoint, match="is a link"):
        push(adapter, REPO)


# --------------------------------------------------------------------------------- loaded in a fresh process

ATTACH = """
    import json, sys
    import torch
    import orthokv
    from tests.support.tiny import tiny_model
    model = orthokv.attach(tiny_model("llama"), sys.argv[1])
"""
FROM_PRETRAINED = """
    import json, sys
    import torch
    import orthokv
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
GENERATE = """
    torch.set_num_threads(1)
    tokens = torch.tensor(json.loads(sys.argv[2]))
    print(json.dumps(model.generate(tokens, max_new_tokens=12, do_sample=False).tolist()))
"""


@pytest.mark.parametrize(("form", "code"), [("adapter", ATTACH), ("full", FROM_PRETRAINED)])
def test_what_was_pushed_generates_in_a_fresh_process(
    hub: Hub, written: Callable[[Form], Path], form: Form, code: str, tmp_path: Path
) -> None:
    folder = written(form)
    push(folder, REPO)
    tokens = tiny_tokens(1, 6, seed=4)
    model: Any = orthokv.attach(tiny_model("llama"), folder)
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False).tolist()
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "fresh"),
        "HF_HUB_OFFLINE": "0",
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code + GENERATE), REPO, json.dumps(tokens.tolist())],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert hub.asked_for("orthokv.safetensors")
    plain: Any = tiny_model("llama")
    with torch.no_grad():
        uncompressed = plain.generate(tokens, max_new_tokens=12, do_sample=False).tolist()
    assert uncompressed != expected, "the bases should make a difference that shows"


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "repo_id", ["small", "a/b/c", "../x", "team/", "team/a b", "team/x.git", "team/a..b"]
)
def test_a_name_that_is_no_repository_is_refused_before_anything_is_asked(
    hub: Hub, adapter: Path, repo_id: str
) -> None:
    with pytest.raises(InvalidSetting, match="not the id of a hub repository"):
        push(adapter, repo_id)
    assert not hub.requests


def test_an_altered_checkpoint_is_not_pushed(hub: Hub, adapter: Path) -> None:
    with (adapter / CARD).open("a") as card:
        card.write("better than measured\n")
    with pytest.raises(InvalidCheckpoint, match="was altered"):
        push(adapter, REPO)
    assert not hub.requests


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, adapter: Path) -> None:
    hub.repos[REPO] = Repo({})
    with pytest.raises(PushFailed, match="exists and is public"):
        push(adapter, REPO, private=True)
    assert not hub.commits


def test_a_repository_with_another_model_is_left_alone(hub: Hub, adapter: Path) -> None:
    hub.repos[REPO] = Repo({"model.safetensors": b"theirs", "LICENSE": b"kept"})
    with pytest.raises(PushFailed, match="holds files of something else"):
        push(adapter, REPO)
    assert hub.repos[REPO].files == {"model.safetensors": b"theirs", "LICENSE": b"kept"}
    del hub.repos[REPO].files["model.safetensors"]
    push(adapter, REPO)
    assert hub.repos[REPO].files["LICENSE"] == b"kept"


REFUSALS = [
    ("create", 401, "does not accept the token"),
    ("create", 403, "may not write"),
    ("preupload", 403, "may not write"),
    ("batch", 401, "does not accept the token"),
    ("commit", 403, "may not write"),
    ("commit", 409, "changed by somebody else meanwhile"),
    ("commit", 412, "changed by somebody else meanwhile"),
    ("commit", 500, "status 500"),
]


@pytest.mark.parametrize(("kind", "status", "message"), REFUSALS)
def test_a_refusal_of_the_hub_is_one_line_without_the_token(
    hub: Hub,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    status: int,
    message: str,
) -> None:
    hub.refusals[kind] = status
    with pytest.raises(SystemExit) as ended:
        main(["push", str(adapter), REPO])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert hub.token not in said.err + said.out
    assert not hub.commits


def test_a_wrong_token_is_one_line_without_it(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_canary")
    with pytest.raises(SystemExit) as ended:
        main(["push", str(adapter), REPO])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert said.err.startswith("orthokv: the hub does not accept the token (401)")
    assert "canary" not in said.err


def test_without_a_token_nothing_is_asked(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushFailed, match="needs a token: set HF_TOKEN"):
        push(adapter, REPO)
    assert not hub.requests


def test_a_hub_that_is_away_is_one_line(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        main(["push", str(adapter), REPO])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err == "orthokv: the hub cannot be reached (ConnectError)\n"


# ------------------------------------------------------------------------------------------ the command line


def test_the_command_prints_the_commit(hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["push", str(adapter), REPO, "--private", "--revision", "v1", "--json"])
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["commit"] == hub.repos[REPO].others["v1"].commit
    assert set(said["files"]) == {path.name for path in adapter.iterdir()}


def test_a_dry_run_lists_all_and_asks_nothing(
    hub: Hub, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit) as ended:
        main(["push", str(adapter), REPO, "--dry-run"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "dry run: nothing was sent" in out
    for path in adapter.iterdir():
        assert path.name in out
    assert not hub.requests
