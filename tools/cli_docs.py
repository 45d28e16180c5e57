"""`docs/cli.md`: every command of `orthokv`, from the commands themselves.

python -m tools.cli_docs [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args

from orthokv import cli
from tools.pages import bring_up_to_date, cell

PAGE = Path("docs/cli.md")

HEAD = """\
# The command line

Written by `python -m tools.cli_docs` from the commands: `make check` fails where they differ.

`orthokv jobs` is also installed as `orthokv-client`, with the client alone (`pip install ./clients/python`). Results go to
standard output; progress, warnings and errors go to standard error. Exit codes: 0 done, 2 bad input, 3 budget unreachable,
1 anything else.

A dataset is JSONL (`text` field, or `--field`), plain text, Parquet or a hub data set id; to calibrate also `self`: the model
writes its own text. Models are safetensors; code and pickles are never loaded.
"""


def page() -> str:
    commands: dict[str, Any] = {command.name: command for command in cli.commands()}
    for name, found in _leaves(commands):
        if _about(found)[0].startswith("Needs pip install"):
            raise SystemExit(f"{name} cannot be described: {_about(found)[0]}")
    index = [
        f"| [`{name}`](#{_anchor(name)}) | {cell(_about(found)[0])} |" for name, found in _leaves(commands)
    ]
    parts = [HEAD, "\n".join(["| | |", "|---|---|", *index]) + "\n"]
    parts += [_section(name, found) for name, found in _leaves(commands)]
    return "\n".join(parts)


def _leaves(commands: dict[str, Any], before: str = "orthokv") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its full name."""
    for name, found in commands.items():
        inner = getattr(found, "commands", None)
        if inner:
            yield from _leaves(inner, f"{before} {name}")
        else:
            yield f"{before} {name}", found


def _section(name: str, found: Any) -> str:
    first, *rest = _about(found)
    arguments = [one for one in found.params if not one.opts[0].startswith("-")]
    options = [one for one in found.params if one.opts[0].startswith("-") and not one.hidden]
    usage = " ".join([name, *(_placeholder(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## `{name}`", first, *rest, f"```\n{usage}\n```"]
    if arguments:
        rows = [f"| `{_placeholder(one)}` | {cell(one.help or '')} |" for one in arguments]
        parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
    if options:
        rows = [f"| {_names(one)} | {_default(one)} | {cell(_help(one))} |" for one in options]
        parts.append("\n".join(["| option | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _about(found: Any) -> list[str]:
    """The paragraphs of a command's help, each on one line."""
    text = cleandoc(found.help or "")
    return [re.sub(r"\s+", " ", part).strip() for part in text.split("\n\n")]


def _placeholder(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag or option.is_bool_flag:
        return names
    return f"{names} {option.metavar or _kind(option.type_descriptor.annotation)}"


def _kind(annotation: Any) -> str:
    """What is typed behind an option: `TEXT`, `INTEGER`, ... or the words to choose from."""
    if choices := [str(one) for one in get_args(annotation) if isinstance(one, str)]:
        return " or ".join(f"`{choice}`" for choice in choices)
    kinds = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}
    return kinds.get(annotation, "TEXT")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    if value is None or value is False or value == [] or value == () or callable(value):
        return ""
    return f"`{value}`"


def _help(option: Any) -> str:
    said = [option.help or ""]
    if option.envvar:
        names = option.envvar if isinstance(option.envvar, list) else [option.envvar]
        said.append(f"Environment: {', '.join(f'`{name}`' for name in names)}.")
    if option.multiple and "several times" not in (option.help or ""):
        said.append("May be given several times.")
    return " ".join(part for part in said if part)


def _anchor(name: str) -> str:
    """As GitHub makes it of a heading."""
    return name.replace(" ", "-")


if __name__ == "__main__":
    sys.exit(bring_up_to_date(PAGE, page(), sys.argv[1:]))
