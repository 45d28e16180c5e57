"""The walk with curl, as the documents have it, pasted into a shell beside a real server."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.orthokv_server import Server
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow  # a real fit

WALK = re.compile(r"^```bash\n(URL=http://127\.0\.0\.1:8000 .*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_walk_with_curl_runs_as_it_stands(tmp_path: Path) -> None:
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    (walk,) = [
        found for document in documents for found in WALK.findall(document.read_text(encoding="utf-8"))
    ]
    for name in ("demo", "docs", "README.md"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    with Server(tmp_path / "orthokv-data", {}) as server:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", walk.replace("http://127.0.0.1:8000", server.url)],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log()}"
    assert "succeeded finished" in done.stdout
    assert "resumed: digest matches" in done.stdout
    assert "orthokv.safetensors: OK" in done.stdout
    assert done.stdout.rstrip().endswith("queued")
