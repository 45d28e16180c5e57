"""Parts of one result file, measured by several processes, put together: `python -m benchmarks.merge OUT PART ...`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench import Results


def merge_cases(out: Path, parts: list[Path]) -> None:
    """The same for files of one list of `cases` (promise, nesting)."""
    read = [json.loads(part.read_text()) for part in parts]
    for part, data in zip(parts, read, strict=True):
        if {**data, "cases": []} != {**read[0], "cases": []}:
            sys.exit(f"{part} was measured under other settings than {parts[0]}")
    cases = [case for data in read for case in data["cases"]]
    out.write_text(json.dumps({**read[0], "cases": cases}, indent=1) + "\n")


def merge(out: Path, parts: list[Path]) -> Results:
    """All rows of `parts` in the order given; ends the program where they were not measured under one header.

    What a model writes itself may differ between the parts: then each row is labelled with its own calibration digest.
    """
    read = [json.loads(part.read_text()) for part in parts]
    headers = [_without_digest(data["header"]) for data in read]
    for part, header in zip(parts, headers, strict=True):
        if header != headers[0]:
            sys.exit(f"{part} was measured under another header than {parts[0]}")
    several = any(data["header"] != read[0]["header"] for data in read)
    found = Results.open(out, headers[0] if several else read[0]["header"])
    for data in read:
        label = {"calibration_digest": data["header"]["calibration"]["digest"]} if several else {}
        measured = [_without_seconds(row) for row in found.rows]
        for row in ({**label, **row} for row in data["rows"]):
            if _without_seconds(row) not in measured:  # a variant that several parts needed
                found.rows.append(row)
        found.refused += [entry for entry in data["refused"] if entry not in found.refused]
    found.save()
    return found


def _without_digest(header: dict[str, Any]) -> dict[str, Any]:
    found = copy.deepcopy(header)
    found.get("calibration", {}).pop("digest", None)
    return found


def _without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "seconds": None}


def main() -> None:
    out, *parts = map(Path, sys.argv[1:])
    if not parts:
        sys.exit("name a file to write and at least one part")
    (merge_cases if "cases" in json.loads(parts[0].read_text()) else merge)(out, parts)


if __name__ == "__main__":
    main()
