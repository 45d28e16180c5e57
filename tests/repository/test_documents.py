"""The documents: their links lead somewhere, the index names them all, and what they tell a reader to paste works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import orthokv
from tests.support.orthokv_server import Server
from tests.support.paths import DEMO, REPOSITORY

DOCS = REPOSITORY / "docs"
_FOLDERS = (REPOSITORY, DOCS, DOCS / "decisions", REPOSITORY / "examples", REPOSITORY / "benchmarks")
PAGES = [
    page for folder in (*_FOLDERS, REPOSITORY / "clients" / "python") for page in sorted(folder.glob("*.md"))
]
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for file, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {file}{anchor}"


def links(page: Path) -> set[Path]:
    return {(page.parent / file).resolve() for file, _ in _LINK.findall(page.read_text()) if file}


def test_the_index_names_every_document() -> None:
    assert {*DOCS.glob("*.md")} - {DOCS / "README.md"} <= links(DOCS / "README.md")


def test_the_list_of_decisions_is_complete_and_has_their_titles() -> None:
    listed = (DOCS / "decisions" / "README.md").read_text()
    for decision in (DOCS / "decisions").glob("0*.md"):
        number, title = re.match(r"# (\d+)\. (.+)", decision.read_text()).groups()  # type: ignore[union-attr]
        assert f"\n{number}. [{title}]({decision.name})\n" in listed


@pytest.mark.slow  # a fit of a real model
def test_the_python_of_the_readme_compresses_attaches_and_generates(tmp_path: Path) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    code = code.replace('"org/model"', repr(str(DEMO)))
    # As many blocks and steps as a small model on a CPU needs to show that it works.
    quick = "kept=0.25, num_samples=4, sequence_length=64, steps=4, refine_steps=4"
    assert "kept=0.25" in code
    (tmp_path / "readme.py").write_text(code.replace("kept=0.25", quick))
    (tmp_path / "calibration.jsonl").write_text('{"text": "Once upon a time there was a cache."}\n' * 99)
    done = run([sys.executable, "readme.py"], tmp_path)
    assert "Once upon a time" in done.stdout
    assert orthokv.read_checkpoint(tmp_path / "small").config["cache"]["kept"] <= 0.25


@pytest.mark.slow  # a real job
def test_the_walk_with_curl_runs_as_it_is_pasted(tmp_path: Path) -> None:
    (walk,) = re.findall(r"^```bash\n(.*?)^```$", (DOCS / "service.md").read_text(), re.DOTALL | re.MULTILINE)
    with Server(tmp_path / "data", {"OMP_NUM_THREADS": "1"}) as server:
        walk = walk.replace("http://127.0.0.1:8000", server.url).replace(
            "$REPO/orthokv-data", str(server.data)
        )
        done = run(["bash", "-euo", "pipefail", "-c", walk], REPOSITORY, TMPDIR=str(tmp_path))
    said = done.stdout.splitlines()
    assert said[0] == "ready"
    assert any(line.startswith("succeeded") for line in said)
    assert "resumed: digest matches" in said
    assert "orthokv.safetensors: OK" in said
    assert said[-1] == "queued"


def run(command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done
