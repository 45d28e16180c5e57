"""`python -m orthokv.cli`."""

from __future__ import annotations

from orthokv.cli import main

main()
