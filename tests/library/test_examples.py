"""Every program in `examples/` runs as it stands, in a process of its own, and does what its first line says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orthokv
from tests.support.hub import serve_hub
from tests.support.orthokv_server import Server
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow  # fits of a real model

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds as far as the examples read it; what they write is left out of the repository."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("demo", "README.md"):
        (folder / name).symlink_to(REPOSITORY / name)
    return folder


def run(place: Path, name: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """What the first example makes, for the others."""
    said = run(place, "compress.py")
    out = place / "out" / "examples" / "small"
    assert orthokv.read_checkpoint(out).config["cache"]["kept"] <= 0.5
    assert str(orthokv.read_checkpoint(out).config["cache"]["bytes_per_token"]) in said
    return out


@pytest.mark.usefixtures("small")
def test_generation_takes_half_of_the_cache(place: Path) -> None:
    dense, compressed = (int(found) for found in re.findall(r"holds (\d+) bytes", run(place, "generate.py")))
    assert compressed <= 0.51 * dense


@pytest.mark.usefixtures("small")
def test_one_profile_serves_two_budgets(place: Path) -> None:
    said = run(place, "two_budgets.py")
    assert len(said.splitlines()) == 2
    for kept in (0.75, 0.25):
        folder = place / "out" / "examples" / f"kept-{kept}"
        assert orthokv.read_checkpoint(folder).config["cache"]["kept"] <= kept


def test_a_method_of_ones_own_is_fitted_beside_a_built_in_one(place: Path) -> None:
    said = run(place, "own_method.py")
    assert len(re.findall(r"KL \d", said)) == 3
    method = orthokv.read_checkpoint(place / "out" / "examples" / "method-read-1.0").config["method"]
    assert method == {"name": "read", "weight": 1.0, "refine_steps": 0}


def test_a_checkpoint_is_sent_to_the_hub_only_where_that_is_asked(
    place: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(monkeypatch, tmp_path / "cache") as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        assert "nothing was sent" in run(place, "push.py", **there)
        assert not hub.requests
        said = run(place, "push.py", "--repository", "team/small", "--send", **there)
        assert "pushed: " in said
        assert {path.name for path in small.iterdir()} <= set(hub.repos["team/small"].files)


def test_a_job_brings_a_checkpoint_from_a_service(place: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "data", {"OMP_NUM_THREADS": "1"}) as server:
        run(place, "job.py", ORTHOKV_URL=server.url)
    assert orthokv.read_checkpoint(place / "out" / "examples" / "job").config["measured"] is not None


def test_the_list_of_examples_is_complete() -> None:
    listed = re.findall(r"^\| \[`(\w+\.py)`\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
