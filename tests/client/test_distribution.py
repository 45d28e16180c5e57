"""The client is a distribution of its own: what an empty environment gets with it, and what it does there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from orthokv_client import __version__
from tests.support.paths import REPOSITORY

SOURCES = REPOSITORY / "clients" / "python"
# The library, and what of its dependencies takes hundreds of megabytes.
HEAVY = {"orthokv", "torch", "transformers", "safetensors", "numpy"}


def run(*command: str | Path) -> str:
    """What a command that succeeds prints, run where no module of this repository is found."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(command[0]).parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that was empty before the client was installed into it."""
    folder = tmp_path_factory.mktemp("empty")
    # A copy: a build leaves its folders beside the sources, and takes what an earlier one left there.
    sources = shutil.copytree(
        SOURCES, folder / "sources", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", sources)
    return programs


@pytest.mark.slow
def test_an_empty_environment_gets_the_client_and_no_torch(programs: Path) -> None:
    listed = json.loads(run(programs / "python", "-m", "pip", "list", "--format", "json"))
    versions = {package["name"]: package["version"] for package in listed}
    assert versions["orthokv-client"] == __version__
    assert not HEAVY & versions.keys()
    # pip, setuptools, the client, its four dependencies and theirs.
    assert len(versions) < 30, sorted(versions)


@pytest.mark.slow
def test_it_imports_there_without_torch(programs: Path) -> None:
    program = "import json, sys, orthokv_client; print(json.dumps([orthokv_client.__file__, *sys.modules]))"
    file, *modules = json.loads(run(programs / "python", "-c", program))
    assert Path(file).is_relative_to(programs.parent)
    assert not HEAVY & set(modules)


@pytest.mark.slow
def test_it_brings_its_own_command(programs: Path) -> None:
    assert "submit" in run(programs / "orthokv-client", "--help")
    done = subprocess.run(
        [programs / "orthokv-client", "list", "--status", "over"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "'over' is not one of 'queued', 'running'" in done.stderr


@pytest.mark.slow
def test_it_brings_its_types_and_its_licence(programs: Path) -> None:
    program = "from importlib.metadata import files; print(*files('orthokv-client'), sep='\\n')"
    names = {Path(line).name for line in run(programs / "python", "-c", program).splitlines()}
    assert {"py.typed", "LICENSE"} <= names


def test_its_version_is_that_of_the_library() -> None:
    assert __version__ == project(REPOSITORY)["version"]


def test_what_both_need_is_asked_for_alike() -> None:
    """By the same lower bounds: an environment with both has one answer."""
    ours, server = project(SOURCES)["dependencies"], project(REPOSITORY)
    assert set(ours) <= {*server["dependencies"], *server["optional-dependencies"]["server"]}


def test_no_extra_names_it() -> None:
    """It is on no index: pip would look for somebody else's package of this name."""
    found = project(REPOSITORY)
    asked = [
        *found["dependencies"],
        *(one for extra in found["optional-dependencies"].values() for one in extra),
    ]
    assert asked
    assert not [one for one in asked if one.replace("_", "-").startswith("orthokv-client")]


def test_orthokv_jobs_is_the_clients() -> None:
    (entry,) = entry_points(group="orthokv.commands", name="jobs")
    assert entry.dist is not None
    assert (entry.dist.name, entry.value) == ("orthokv-client", "orthokv_client.cli:jobs")


@pytest.mark.parametrize("command", [["jobs", "list", "--limit", "1"], ["mlflow-export", "--once"]])
def test_without_it_a_command_says_where_it_is(command: list[str]) -> None:
    program = "import sys; sys.modules['orthokv_client'] = None; from orthokv.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (
        2,
        f"orthokv: 'orthokv {command[0]}' needs pip install ./clients/python (orthokv_client is not installed)\n",
    )


def project(folder: Path) -> dict[str, Any]:
    with (folder / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table
