"""Parts of one result file, measured by several processes, put together: ``python -m benchmarks.merge OUT PART ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.bench import Results


def merge(out: Path, parts: list[Path]) -> Results:
    """All rows of ``parts`` in the order given; ends the program where they were not measured under one header."""
    found: Results | None = None
    for part in parts:
        data = json.loads(part.read_text())
        if found is None:
            found = Results.open(out, data["header"])
        elif found.header != data["header"]:
            sys.exit(f"{part} was measured under another header than {parts[0]}")
        found.rows += [row for row in data["rows"] if row not in found.rows]
        found.refused += [entry for entry in data["refused"] if entry not in found.refused]
    if found is None:
        sys.exit("name at least one part")
    found.save()
    return found


if __name__ == "__main__":
    merge(Path(sys.argv[1]), [Path(part) for part in sys.argv[2:]])
