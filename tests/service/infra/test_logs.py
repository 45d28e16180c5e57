"""Log lines of libraries, and of a worker's child."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.infra.ids import new_id
from app.infra.keys import generate
from app.jobs.vocabulary import StepName
from app.settings import Settings
from tests.support.paths import REPOSITORY
from tests.support.requests import step_request
from workers.child import MAX_SAID_CHARACTERS, MAX_SAID_LINES, Child
from workers.limits import Limits


def logged(code: str, *arguments: str) -> list[dict[str, Any]]:
    """What a process that has set up its logs writes to stderr."""
    begin = "import logging, sys, structlog; from app.infra.logs import configure; configure();"
    done = subprocess.run(
        [sys.executable, "-c", f"{begin} {code}", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_libraries_log_in_the_same_form() -> None:
    bind = "structlog.contextvars.bind_contextvars(request_id='req_1');"
    (line,) = logged(f"{bind} logging.getLogger('uvicorn.error').warning('it %s', 'broke')")
    assert (line["event"], line["level"], line["logger"]) == ("it broke", "warning", "uvicorn.error")
    assert line["request_id"] == "req_1"
    assert line["timestamp"].endswith("Z")


def test_an_exception_is_one_line() -> None:
    code = 'exec(\'try:\\n  1 / 0\\nexcept ZeroDivisionError:\\n  logging.getLogger("x").exception("no")\')'
    (line,) = logged(code)
    assert "ZeroDivisionError" in line["exception"]


@pytest.mark.parametrize(
    "code", ["logging.getLogger('x').error(sys.argv[1])", "structlog.get_logger().info('x', y=sys.argv[1])"]
)
def test_no_line_holds_a_key(code: str) -> None:
    key = generate(new_id("key"))
    (line,) = logged(code, key)
    assert key not in json.dumps(line)
    assert "[redacted]" in json.dumps(line)


def said(program: str, folder: Path) -> list[str]:
    """The lines that are passed on of what a child writes to stderr."""
    request = step_request("fit", workdir=str(folder))
    lines: list[str] = []
    child = Child(
        (sys.executable, "-c", program),
        request,
        environment=(),
        limits=Limits.of(Settings(), StepName.FIT),
        on_line=lines.append,
    )
    assert child.wait() == 0
    return lines


def test_lines_of_a_child_come_whole_whatever_pieces_they_are_written_in(tmp_path: Path) -> None:
    program = "import os, time\nfor part in (b'one\\ntw', b'o\\n\\n', b'thr\\xffee'): os.write(2, part); time.sleep(0.05)"
    assert said(program, tmp_path) == ["one", "two", "thr�ee"]


def test_of_a_progress_bar_the_last_state_is_passed_on(tmp_path: Path) -> None:
    assert said("import os; os.write(2, b'\\r 1/3\\r 2/3\\r 3/3\\n')", tmp_path) == [" 3/3"]


def test_a_child_that_never_stops_talking_is_cut_short(tmp_path: Path) -> None:
    program = "import sys\nfor n in range(2000): print('x' * 5000, file=sys.stderr)"
    lines = said(program, tmp_path)
    assert len(lines) == MAX_SAID_LINES + 1
    assert lines[-1] == "(more lines are not logged)"
    assert {len(line) for line in lines[:-1]} == {MAX_SAID_CHARACTERS}
