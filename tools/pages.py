"""Pages of the documentation that are written by a program: brought up to date, or checked."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def bring_up_to_date(page: Path, wanted: str, arguments: list[str]) -> int:
    """Write the page where it differs; with `--check` only say so. Returns the exit code."""
    if page.is_file() and page.read_text(encoding="utf-8") == wanted:
        return 0
    if "--check" in arguments:
        sys.stderr.write(f"{page} is out of date: run `make docs` and commit it\n")
        return 1
    page.write_text(wanted, encoding="utf-8")
    return 0


def cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("*", "\\*").strip()
