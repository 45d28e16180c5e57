"""The table of supported architectures in `docs/architectures.md`: made of the registry and of what the tests cover.

python -m tools.support_table [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

from orthokv.models.architectures import ARCHITECTURES
from orthokv.models.geometry import geometry_of
from orthokv.spec.architectures import MODEL_TYPES
from orthokv.spec.geometry import STATIC_ROPE, rope_types
from tests.support.tiny import EAGER_ONLY, VARIANTS, tiny_config

DOCUMENT = Path("docs/architectures.md")
BEGIN, END = "<!-- begin: python -m tools.support_table -->", "<!-- end -->"


def render() -> str:
    rows = [
        "| architecture | `model_type` | key modes | RoPE types tested | special |",
        "|---|---|---|---|---|",
    ]
    for name, architecture in sorted(ARCHITECTURES.items(), key=lambda item: item[1].models.lower()):
        cells = [architecture.models, f"`{name}`", _key_modes(name), _types(name), _special(name)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _key_modes(name: str) -> str:
    return "`pre` and `post`" if MODEL_TYPES[name].rotary else "`pre` is `post`: nothing is rotated"


def _types(name: str) -> str:
    """Of all tiny models of an architecture; those that serve one key mode only with that mode."""
    found: set[str] = set()
    for variant in VARIANTS:
        if variant.split("+")[0] == name:
            found |= rope_types(geometry_of(tiny_config(variant)))
    order = sorted(found, key=lambda kind: (kind not in STATIC_ROPE, kind))
    return ", ".join(kind if kind in STATIC_ROPE else f"{kind} (`post` only)" for kind in order) or "none"


def _special(name: str) -> str:
    eager = ["eager attention only"] if name in EAGER_ONLY else []
    return "; ".join([part for part in [ARCHITECTURES[name].special, *eager] if part])


def main(arguments: list[str]) -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if "--check" not in arguments:
        DOCUMENT.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        sys.stderr.write(f"{DOCUMENT} is out of date: run `make table` and commit it\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
