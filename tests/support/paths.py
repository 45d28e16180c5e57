"""Where things are that tests start or read."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "demo" / "demo-llama-3m"
SCRIPTED_RUNNER = Path(__file__).with_name("scripted_runner.py")
