"""What of `orthokv_client` is generated: models and words from openapi.json, the synchronous client from the asynchronous one.

python -m tools.client_sources [--check]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENT = ROOT / "clients" / "python" / "orthokv_client"
MODELS = CLIENT / "models.py"
WORDS = CLIENT / "words.py"
PAIRS = {
    CLIENT / "asynchronous.py": CLIENT / "synchronous.py",
    CLIENT / "connection_async.py": CLIENT / "connection.py",
    CLIENT / "resources_async.py": CLIENT / "resources.py",
}

_MODELS_HEADER = '"""Bodies of the API. Generated from openapi.json by `make client`: do not edit."""'
_WORDS_HEADER = '"""Words of the API. Generated from openapi.json by `make client`: do not edit."""'
_SYNC_HEADER = '"""{what}. Generated from {source} by `make client`: do not edit."""'
_OPTIONS = (
    *("--input-file-type", "openapi", "--output-model-type", "pydantic_v2.BaseModel"),
    *("--target-python-version", "3.11", "--target-pydantic-version", "2.12"),
    *("--base-class", "orthokv_client.base.Model"),
    *("--enum-field-as-literal", "all", "--use-standard-collections", "--use-union-operator"),
    *("--use-annotated", "--use-schema-description", "--use-field-description", "--use-double-quotes"),
    *("--collapse-root-models", "--disable-timestamp", "--field-constraints", "--use-one-literal-as-default"),
    *("--strict-nullable", "--use-single-line-docstring"),
    *("--output-datetime-class", "AwareDatetime", "--formatters", "builtin"),
)
# Closed vocabularies that the client's own functions speak of: a schema, and its field whose words they are.
_VOCABULARIES = {
    "MethodType": ("Method", "type"),
    "Sharing": ("Method", "sharing"),
    "KeyMode": ("Method", "key_mode"),
    "Parameterisation": ("Method", "parameterisation"),
    "Form": ("JobCreate", "form"),
    "DatasetFormat": ("DatasetCreate", "format"),
    "JobStatus": ("Job", "status"),
    "JobErrorCode": ("JobError", "code"),
    "DeliveryStatus": ("WebhookDelivery", "status"),
}
# Parts of them that the document names: a schema, its field, the extension.
_PARTS = {
    "ENDED": ("JobStatus", "Job", "status", "x-ended"),
    "INPUT_FAULTS": ("JobErrorCode", "JobError", "code", "x-input-faults"),
}
# What the fields of these schemas mean, for the help of the commands.
_EXPLAINED = ("Method", "JobCreate")
_SYNC_DOCS = {
    "synchronous": "The synchronous client",
    "connection": "Its connection",
    "resources": "Its resources",
}
# What differs between the two clients; all else is the same text.
_SYNC_NAMES = {
    "AsyncOrthoKV": "OrthoKV",
    "AsyncClient": "Client",
    "AsyncIterator": "Iterator",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "aclose": "close",
    "aread": "read",
}


def _plain(node: Any) -> Any:
    """The document with less for the generator to make classes of: no titles, and no unions for what may be null."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _plain(value) for key, value in node.items() if not key.startswith("x-")}
    if isinstance(node.get("title"), str) and "info" not in node:
        del node["title"]
    if "$ref" in node:
        node.pop("default", None)  # of a whole object: the server's to fill in
    match node.get("anyOf"):
        case [{"type": str(kind)} as only, {"type": "null"}] if "enum" not in only and "const" not in only:
            del node["anyOf"]
            node = {**only, **node, "type": [kind, "null"]}
    return node


def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
    return document


def models() -> str:
    """Models of every schema of openapi.json."""
    document = _document()
    schemas = _plain(document["components"]["schemas"])
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "openapi.json", Path(folder) / "models.py"
        source.write_text(json.dumps({**document, "paths": {}, "components": {"schemas": schemas}}))
        command = [sys.executable, "-m", "datamodel_code_generator", *_OPTIONS]
        subprocess.run([*command, "--input", str(source), "--output", str(output)], check=True)
        text = output.read_text(encoding="utf-8")
    body = re.sub(r"\A(#.*\n|\n)+", "", text)
    return _formatted(f"{_MODELS_HEADER}\n\n{body}", MODELS)


def words() -> str:
    """The vocabularies of openapi.json that are spoken outside of bodies."""
    document = _document()
    schemas = document["components"]["schemas"]
    lines = [_WORDS_HEADER, "from __future__ import annotations", "from typing import Literal"]
    for name, (schema, field) in _VOCABULARIES.items():
        lines.append(_literal(name, schemas[schema]["properties"][field], schemas))
    order = next(one for one in document["paths"]["/v1/jobs"]["get"]["parameters"] if one["name"] == "order")
    lines.append(_literal("Order", order["schema"], schemas))
    for name, (kind, schema, field, extension) in _PARTS.items():
        chosen = ", ".join(f'"{word}"' for word in schemas[schema]["properties"][field][extension])
        lines.append(f"{name}: frozenset[{kind}] = frozenset({{{chosen}}})")
    help_of = {
        field: about["description"]
        for schema in _EXPLAINED
        for field, about in schemas[schema]["properties"].items()
        if "description" in about
    }
    lines.append(f"HELP = {help_of!r}\n")
    return _formatted("\n\n".join(lines), WORDS)


def _literal(name: str, node: dict[str, Any], schemas: dict[str, Any]) -> str:
    """The type of a field with a closed vocabulary, be it named, in place, or one that may be null."""
    kinds = [one for one in node.get("anyOf", [node]) if one.get("type") != "null"]
    (kind,) = [schemas[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in kinds]
    return f"{name} = Literal[{', '.join(json.dumps(word) for word in kind['enum'])}]"


def synchronous(source: Path, target: Path) -> str:
    """An asynchronous module's text without `async` and `await`."""
    text = source.read_text(encoding="utf-8")
    what = _SYNC_DOCS[target.stem]
    text = re.sub(r'\A""".*?"""', _SYNC_HEADER.format(what=what, source=source.name), text, flags=re.DOTALL)
    text = re.sub(r"\basync (def|for|with)\b", r"\1", text)
    text = re.sub(r"\bawait ", "", text)
    for name, replacement in _SYNC_NAMES.items():
        text = re.sub(rf"\b{name}\b", replacement, text)
    text = re.sub(r"\bAsync([A-Z]\w+)", r"\1", text)
    text = re.sub(r"\borthokv_client\.(running|resources|connection)_async\b", r"orthokv_client.\1", text)
    text = text.replace("orthokv_client.asynchronous", "orthokv_client.synchronous")
    return _formatted(text, target)


def _formatted(text: str, path: Path) -> str:
    for command in (["check", "--fix", "--quiet", "--unfixable", "F401"], ["format"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        if not done.stdout:
            raise SystemExit(done.stderr)
        text = done.stdout
    return text


def main(arguments: list[str]) -> int:
    wanted = {MODELS: models(), WORDS: words()} | {
        sync: synchronous(source, sync) for source, sync in PAIRS.items()
    }
    stale = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is not what its source makes: run `make client`\n")
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
