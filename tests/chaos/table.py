"""The table of docs/reliability.md, from the reports: `python -m tests.chaos.table benchmarks/results/chaos-*.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def rows(reports: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each figure, a column for each report."""
    kinds = sorted({kind for report in reports for kind in report["faults"]})
    again = sorted({kind for report in reports for kind in report["reclaim_seconds"]})

    def ended(report: dict[str, Any]) -> str:
        return ", ".join(f"{count} {status}" for status, count in report["jobs"]["ended"].items())

    def reclaim(report: dict[str, Any], kind: str) -> str:
        found = report["reclaim_seconds"].get(kind)
        return f"{found['p50']:g} / {found['max']:g} s ({found['count']})" if found else "–"

    table = [["", *(f"`{report['command'].removeprefix('python -m tests.chaos ')}`" for report in reports)]]
    table.append(["jobs acknowledged", *(str(report["jobs"]["acknowledged"]) for report in reports)])
    table.append(["how they ended", *(ended(report) for report in reports)])
    for name in ("layers", "events"):
        table.append([f"{name} committed" if name == "layers" else name, *(str(r[name]) for r in reports)])
    table.append(["attempts lost", *(str(report["jobs"]["attempts_lost"]) for report in reports)])
    for kind in kinds:
        table.append([f"`{kind}`", *(str(report["faults"].get(kind, "–")) for report in reports)])
    for kind in again:
        table.append(
            [
                f"until claimed again, {kind}: p50 / max (kills)",
                *(reclaim(report, kind) for report in reports),
            ]
        )
    table.append(["processes that ended by themselves", *(str(len(r["unexpected_deaths"])) for r in reports)])
    table.append(["**violations**", *(f"**{len(report['violations'])}**" for report in reports)])
    return table


def main() -> None:
    table = rows([json.loads(Path(name).read_text()) for name in sys.argv[1:]])
    table.insert(1, ["---"] * len(table[0]))
    for line in table:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
