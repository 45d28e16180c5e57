"""Write `openapi.json` from the routes, or with --check compare the two.

python -m tools.openapi [--check] [FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from app.main import create_app
from app.settings import Settings

DOCUMENT = Path("openapi.json")


def render() -> str:
    return json.dumps(create_app(Settings()).openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    files = [Path(argument) for argument in arguments if argument != "--check"]
    path = files[0] if files else DOCUMENT
    document = render()
    if not check:
        path.write_text(document, encoding="utf-8")
        return 0
    if not path.is_file() or path.read_text(encoding="utf-8") != document:
        sys.stderr.write(f"{path} differs from the routes: run `make openapi` and commit it\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
