"""`docs/library.md`: what `import orthokv` gives, from its signatures and docstrings.

python -m tools.library_docs [--check]
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import orthokv
from orthokv import face
from orthokv.pipeline import Compressed
from orthokv.planning.plan import Plan
from orthokv.spec import errors
from orthokv.spec.codec import CodecSpec, codec_spec
from orthokv.spec.methods import METHODS, MethodSettings
from tools.pages import bring_up_to_date, cell

PAGE = Path("docs/library.md")

HEAD = """\
# The library

Written by `python -m tools.library_docs` from signatures and docstrings: `make check` fails where they differ. Short
programs that use what stands here: [examples](../examples/README.md).

Everything under *Verbs*, *Settings* and *With transformers* is `orthokv.NAME`, and is loaded when it is first used: `import
orthokv` itself loads no torch. Whatever is refused raises an [error](#errors) of one sentence.
"""

VERBS = (
    *("compress", "plan", "evaluate", "attach", "detach"),
    *("load_profile", "read_checkpoint", "cache_bytes", "register_method"),
)
SETTINGS = ("FitSettings", "Target", "Budget", "RankGrid", "TextSource")
RESULTS: dict[str, type[Any]] = {
    "Compressed": Compressed,
    "Plan": Plan,
    "Checkpoint": orthokv.Checkpoint,
    "ErrorProfile": orthokv.ErrorProfile,
}
TRANSFORMERS = ("OrthoKVConfig", "OrthoKVQuantizer")
# Lines of a signature that is longer than this are one parameter each.
WIDTH = 100


@dataclass
class Doc:
    """A docstring in parts: what comes first, and the entries of each titled section."""

    text: str
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Any) -> Doc:
        text, *rest = re.split(
            r"^(Args|Attributes|Returns|Raises):\n", inspect.getdoc(found) or "", flags=re.M
        )
        doc = cls(text.strip())
        for title, body in zip(rest[::2], rest[1::2], strict=True):
            entries, more = _dedented(body)
            doc.sections[title] = [_entry(line, named=title != "Returns") for line in entries]
            if more:
                doc.text += f"\n\n{more}"
        return doc


def _dedented(body: str) -> tuple[list[str], str]:
    """The entries of a section, each on one line; and the text behind it, which is not indented."""
    entries: list[str] = []
    lines = body.splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith("    "):
            return entries, "\n".join(lines[number:]).strip()
        if line.startswith("     ") and entries:
            entries[-1] += f" {line.strip()}"
        elif line.strip():
            entries.append(line.strip())
    return entries, ""


def _entry(line: str, *, named: bool) -> tuple[str, str]:
    name, colon, text = line.partition(": ")
    return (name, text) if named and colon and "`" not in name else ("", line)


def page() -> str:
    shown = {*VERBS, *SETTINGS, *RESULTS, *TRANSFORMERS, "OrthoKVError", "__version__"}
    if missing := {*orthokv.__all__} - shown:
        raise SystemExit(f"tools/library_docs.py shows no {', '.join(sorted(missing))}")
    return "\n".join(
        [
            HEAD,
            "## Verbs\n",
            _aliases(),
            *(_function(name, getattr(orthokv, name)) for name in VERBS),
            "## Settings\n",
            *(_class(name, getattr(orthokv, name)) for name in SETTINGS),
            _codecs(),
            _methods(),
            "## Results\n",
            *(_class(name, found) for name, found in RESULTS.items()),
            "## With transformers\n",
            *(f"### `{name}`\n\n{_text(Doc.of(getattr(orthokv, name)).text)}\n" for name in TRANSFORMERS),
            _errors(),
        ]
    )


def _aliases() -> str:
    model, dataset = (re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(kind)) for kind in (face.Model, face.Dataset))
    return f"In the signatures, `Model` is `{model}`, and `Dataset` is `{dataset}`.\n"


def _function(name: str, found: Callable[..., Any], level: str = "###", owner: str = "") -> str:
    parts = [
        f"{level} `{owner}{name}`",
        f"```python\n{_signature(name, inspect.signature(found))}\n```",
        *_described(Doc.of(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _class(name: str, found: type[Any]) -> str:
    doc = Doc.of(found)
    signature = inspect.signature(found)
    shown = signature.replace(return_annotation=inspect.Signature.empty)
    parts = [f"### `{name}`", f"```python\n{_signature(name, shown)}\n```", *_described(doc)]
    members = [
        f"- `{member}`: {_text(_first(value))}"
        for member, value in vars(found).items()
        if not member.startswith("_") and _is_shown(value)
    ]
    if members:
        parts.append("\n".join(["Also:", "", *members]))
    return "\n\n".join(parts) + "\n"


def _is_shown(value: Any) -> bool:
    return (isinstance(value, (property, classmethod)) or inspect.isfunction(value)) and bool(_first(value))


def _first(value: Any) -> str:
    found = value.__func__ if isinstance(value, classmethod) else value
    return (inspect.getdoc(found) or "").split("\n\n")[0]


def _described(doc: Doc) -> list[str]:
    parts = [_text(doc.text)]
    for title, entries in doc.sections.items():
        if title == "Returns":
            parts.append(f"**Returns** {' '.join(text for _, text in entries)}")
            continue
        lines = [
            f"- `{'`, `'.join(name.split(', '))}`: {text}" if name else f"- {text}" for name, text in entries
        ]
        parts.append("\n".join([f"**{title}**", "", *lines]))
    return parts


def _text(text: str) -> str:
    """Paragraphs on one line each; tables, lists and code as they are."""
    parts = [
        part if re.match(r"[-|>\d]|```|    ", part) else " ".join(part.split()) for part in text.split("\n\n")
    ]
    return "\n\n".join(parts)


def _signature(name: str, signature: inspect.Signature) -> str:
    parts = _parameters(signature)
    result = signature.return_annotation
    arrow = "" if result is inspect.Signature.empty else f" -> {_plain(result)}"
    line = f"{name}({', '.join(parts)}){arrow}"
    return (
        line
        if len(line) <= WIDTH
        else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){arrow}"])
    )


def _parameters(signature: inspect.Signature) -> list[str]:
    parts: list[str] = []
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        text = ("**" if parameter.kind is parameter.VAR_KEYWORD else "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_plain(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {_value(parameter.default)}"
        parts.append(text)
    return parts


def _plain(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.strip("'\"")


def _value(value: Any) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return str(value.__name__)
    if type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":  # what a dataclass writes into its signature
        return "{}"
    return repr(value)


def _codecs() -> str:
    lines = [
        "### Codecs",
        _text(Doc.of(codec_spec).text),
        "A codec's sizes are a `CodecSpec` (`orthokv.spec.codec`).",
        *_described(Doc.of(CodecSpec)),
    ]
    return "\n\n".join(lines) + "\n"


def _methods() -> str:
    """A table of the methods' settings, and what each is, from the settings' docstrings."""
    rows = [
        "| method | settings and their defaults | matrices of a basis | refinement steps |",
        "|---|---|---:|---:|",
    ]
    for name, kind in METHODS.items():
        settings = ", ".join(f"`{one.name}={_value(one.default)}`" for one in fields(kind))
        rows.append(f"| `{name}` | {settings} | {kind.matrices} | {kind.refine_steps} |")
    parts = [
        "### Methods",
        "`method` names one of these ([how they work](method.md)). `steps`, `epochs` and `parameterisation` are fields of "
        '`FitSettings`; the other settings go into its `options`, such as `options={"step_size": 0.01}`.',
        "\n".join(rows),
    ]
    for name, kind in METHODS.items():
        doc = Doc.of(kind)
        parts.append(f"**`{name}`**: {_text(doc.text)}")
        parts += _described(doc)[1:]
    own = Doc.of(MethodSettings)
    parts += [
        "**A method of your own**",
        "A dataclass on `orthokv.spec.methods.MethodSettings`: see `register_method`.",
    ]
    return "\n\n".join([*parts, *_described(own)[1:]]) + "\n"


def _errors() -> str:
    rows = ["| error | code | raised where |", "|---|---|---|"]
    for name, found in vars(errors).items():
        if inspect.isclass(found) and issubclass(found, errors.OrthoKVError):
            rows.append(f"| `{name}` | `{found.code}` | {cell(_first(found))} |")
    text = (
        "All are of `orthokv.spec.errors` and on `orthokv.OrthoKVError`. `InvalidSetting` is a `ValueError`, too. "
        "`BudgetUnreachable` has `asked` and `best`, the closest value that a plan reaches."
    )
    return "\n\n".join(["## Errors", text, "\n".join(rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(bring_up_to_date(PAGE, page(), sys.argv[1:]))
