"""The command."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from tests.chaos.run import run
from tests.chaos.world import Plan


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="A service under random faults."
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="postgres")
    parser.add_argument("--broker", choices=("poll", "celery"), default="celery")
    parser.add_argument("--real", action="store_true", help="jobs on the demo model instead of scripted ones")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(130))  # its servers end with it
    report = run(Plan(told.database, told.broker, told.real), minutes=told.minutes, seed=told.seed)
    text = json.dumps(report, indent=2) + "\n"
    if told.out is not None:
        told.out.write_text(text)
    sys.stdout.write(text)
    return 1 if report["violations"] or report["unexpected_deaths"] else 0


if __name__ == "__main__":
    sys.exit(main())
