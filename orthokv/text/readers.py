"""Readers of text sources. Everything streams: one row or chunk at a time, and only until there is enough."""

from __future__ import annotations

import codecs
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orthokv.compat import packaged_builders
from orthokv.spec.errors import InvalidDataset, InvalidSetting
from orthokv.spec.hub_ids import is_hub_id
from orthokv.text.source import TextSource

# Builders of `datasets` that only parse rows. Others unpickle, decode media or follow links.
SAFE_BUILDERS = ("json", "parquet", "text", "csv", "arrow")


MAX_ROW_BYTES = 64 << 20


MAX_CHUNK_BYTES = 1 << 30  # of a column of a Parquet row group, unpacked


CHUNK_CHARACTERS = 1 << 16


# A single space goes with the word behind it, as tokenizers have it: the pieces give the tokens of the whole.
_CUTS = (re.compile(r".*\S(?= \S)", re.DOTALL), re.compile(r".*\n", re.DOTALL))


def read_texts(source: TextSource) -> Iterator[str]:
    """The texts of `source` in order, none of them empty; plain text comes in chunks of it.

    Raises:
        InvalidDataset: at once where the file is missing, empty or a folder; at a row that is not UTF-8 or
            JSON, or whose field is missing or no string; at the end where no row held text.
        InvalidSetting: the source is `self`.
    """
    kind = source.resolved_format()
    if kind == "self":
        raise InvalidSetting("the model writes the text of 'self' itself: there is nothing to read")
    if kind == "hub":
        return _not_empty(source, _hub_texts(source))
    path = Path(source.source)
    if path.is_dir():
        raise InvalidDataset(f"{path} is a folder: name one file in it")
    if not path.is_file():
        raise InvalidDataset(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise InvalidDataset(f"{path} is empty")
    read = {"jsonl": _jsonl_texts, "text": _plain_texts, "parquet": _parquet_texts}[kind]
    return _not_empty(source, read(source))


def _not_empty(source: TextSource, texts: Iterator[str]) -> Iterator[str]:
    found = False
    for text in texts:
        if text:
            found = True
            yield text
    if not found:
        raise InvalidDataset(f"{source.source} holds no text")


def _field(source: TextSource, row: object, number: int) -> str:
    """The text of row `number` (from 1)."""
    where = f"row {number} of {source.source}"
    if not isinstance(row, dict):
        raise InvalidDataset(f"{where} is a {type(row).__name__}, not an object")
    if source.field not in row:
        found = ", ".join(map(repr, row)) or "none"
        raise InvalidDataset(f"{where} has no field {source.field!r}; its fields are {found}")
    text = row[source.field]
    if not isinstance(text, str):
        raise InvalidDataset(f"field {source.field!r} in {where} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        reason = f"has half of a surrogate pair at character {error.start}"
        raise InvalidDataset(f"field {source.field!r} in {where} {reason}") from error
    return text


def _jsonl_texts(source: TextSource) -> Iterator[str]:
    with open(source.source, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            where = f"row {number} of {source.source}"
            if len(line) > MAX_ROW_BYTES:
                raise InvalidDataset(f"{where} is longer than {MAX_ROW_BYTES} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.isspace() or not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise InvalidDataset(f"{where} is not valid UTF-8 at its byte {error.start}") from error
            except (ValueError, RecursionError) as error:
                raise InvalidDataset(f"{where} is not valid JSON: {error}") from error
            yield _field(source, row, number)


def _plain_texts(source: TextSource) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending, offset, raw = "", 0, b"\n"
    with open(source.source, "rb") as file:
        while raw:
            raw = file.read(CHUNK_CHARACTERS)
            held = len(decoder.getstate()[0])  # bytes of a character that the last read has split
            try:
                piece = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                where = offset - held + error.start
                raise InvalidDataset(f"{source.source} is not valid UTF-8 at byte {where}") from error
            pending += piece if offset else piece.removeprefix("\ufeff")
            offset += len(raw)
            while len(pending) > CHUNK_CHARACTERS:
                end = cut(pending, CHUNK_CHARACTERS)
                yield pending[:end]
                pending = pending[end:]
    yield "" if pending.isspace() else pending


def cut(text: str, limit: int) -> int:
    """Where a piece of at most `limit` characters ends: between words, else after a line, else there."""
    for mark in _CUTS:
        if match := mark.match(text, limit // 2, limit):
            return match.end()
    return limit


def _parquet_texts(source: TextSource) -> Iterator[str]:
    parquet = _extra("pyarrow.parquet", source)
    number = 0
    try:
        with parquet.ParquetFile(source.source) as file:
            described = file.schema_arrow
        # As a dictionary, a value that many rows share is in memory once, as it is in the file.
        shared = [source.field] if source.field in described.names and _is_text(described, source) else None
        with parquet.ParquetFile(source.source, buffer_size=1 << 20, read_dictionary=shared) as file:
            names = file.schema_arrow.names
            if source.field not in names:
                _field(source, dict.fromkeys(names), 1)  # raises, with the columns there are
            _check_pages(file, source)
            for batch in file.iter_batches(batch_size=64, columns=[source.field]):
                for cell in batch.column(0):
                    number += 1
                    yield _field(source, {source.field: cell.as_py()}, number)
    except UnicodeDecodeError as error:
        where = f"row {number} of {source.source}"
        raise InvalidDataset(f"{where} is not valid UTF-8 at its byte {error.start}") from error
    except (_extra("pyarrow", source).ArrowException, OSError) as error:
        raise InvalidDataset(f"{source.source} is not sound Parquet: {error}") from error


def _is_text(schema: Any, source: TextSource) -> bool:
    kind = str(schema.field(source.field).type)
    return kind in ("string", "large_string")


def _check_pages(file: Any, source: TextSource) -> None:
    """Refuse a file whose column unpacks to far more than a row group may have, before any of it is unpacked.

    The footer states the size of each column chunk; pages are unpacked one by one and hold no more than their chunk.
    """
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if column.path_in_schema.split(".")[0] != source.field:
                continue
            if column.total_uncompressed_size > MAX_CHUNK_BYTES:
                raise InvalidDataset(
                    f"row group {group + 1} of {source.source} unpacks to {column.total_uncompressed_size} bytes of "
                    f"{source.field!r}; at most {MAX_CHUNK_BYTES} are read at once: write smaller row groups"
                )


def _hub_texts(source: TextSource) -> Iterator[str]:
    name, datasets = source.source, _extra("datasets", source)
    # The name of a builder would be read as that builder, over whatever lies in the working folder.
    if not is_hub_id(name) or name in packaged_builders():
        raise InvalidDataset(f"{name!r} is not the id of a hub data set")
    try:
        # The prefix keeps a local folder of the same name out.
        builder = datasets.load_dataset_builder(f"hf://datasets/{name}", name=source.config)
        kind = type(builder).__module__.removeprefix("datasets.packaged_modules.").split(".")[0]
        if kind not in SAFE_BUILDERS:
            allowed = ", ".join(SAFE_BUILDERS)
            raise InvalidDataset(f"hub data set {name} needs the builder {kind!r}; allowed are {allowed}")
        rows = builder.as_streaming_dataset(split=source.split)
        for number, row in enumerate(rows, 1):
            yield _field(source, row, number)
    except InvalidDataset:
        raise
    except Exception as error:  # each file format, the hub client and fsspec have errors of their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise InvalidDataset(
            f"{name} is neither a file nor a hub data set that can be read: {reason}"
        ) from error


def _extra(module: str, source: TextSource) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidDataset(f"reading {source.source} needs pip install 'orthokv[datasets]'") from error
