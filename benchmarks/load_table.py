"""The table of docs/reliability.md from what `benchmarks.service_load` measured.

python -m benchmarks.load_table benchmarks/results/service-load-*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def times(found: dict[str, Any]) -> str:
    return f"{found['p50_ms']:.1f} / {found['p99_ms']:.1f} ms"


def at_rate(found: dict[str, Any]) -> str:
    return f"{times(found)} at {found['rate_per_second']:.0f}/s"


def column(report: dict[str, Any]) -> dict[str, str]:
    pages, streams = report["list_jobs"], report["event_streams"]
    first, thousandth = (pages[name]["p50_ms"] for name in ("page_1", "page_1000"))
    storm = report["claim_fastest"]
    connections = streams["database_connections_in_use_at_most"]
    grown = streams["resident_mib_with_streams"] - streams["resident_mib_before"]
    return {
        "`GET /v1/jobs/{id}`: p50 / p99": at_rate(report["get_job"]),
        "… GET as fast as it is answered, 16 connections": f"{report['get_job_fastest']['per_second']:.0f}/s",
        "`GET /v1/jobs`, page 1 and page 1000: p50": f"{first:.1f} and {thousandth:.1f} ms",
        "`POST /v1/jobs` with a key of idempotency, while 8 workers commit: p50 / p99": at_rate(
            report["post_job_while_8_workers_commit"]
        ),
        "… POST as fast as it is answered, 16 connections": f"{report['post_job_fastest']['per_second']:.0f}/s",
        "500 idle event streams: memory of the API": f"+{grown:.0f} MiB, {streams['resident_mib_with_streams']:.0f} MiB in all",
        "… of one core": f"{100 * streams['api_cpu_share_while_idle']:.0f} %",
        "… connections to the database in use": "–" if connections is None else f"at most {connections}",
        "… until an event arrives: p50 / p99": times(streams["event_lag"]),
        "64 idle workers that look every 2 s, 10,000 jobs queued: a claim, p50 / p99": times(report["claim"]),
        "… claimed twice": str(report["claim"]["claimed_twice"] + storm["claimed_twice"]),
        "64 workers that claim without a pause": f"{storm['per_second']:.0f} claims/s, {times(storm)}",
    }


def main() -> None:
    reports = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    columns = [list(column(report).items()) for report in reports]
    print("| |", *(f"{report['database']} |" for report in reports))
    print("|---|" + "---|" * len(reports))
    for row in zip(*columns, strict=True):
        print(f"| {row[0][0]} |", *(f"{value} |" for _, value in row))


if __name__ == "__main__":
    main()
