"""Calibration and evaluation text: from a file, a hub data set or the model itself to packed token blocks.

Everything streams: a source is read one row or chunk at a time, and only until there are enough tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import json
import math
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthokv.errors import InvalidDataset, InvalidModel, InvalidSetting, StorageError
from orthokv.repeatable import repeatable

Format = Literal["jsonl", "text", "parquet", "hub", "self"]

SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
SUFFIXES |= {".txt": "text", ".md": "text", ".parquet": "parquet"}
# Builders of ``datasets`` that only parse rows. Others unpickle, decode media or follow links.
SAFE_BUILDERS = ("json", "parquet", "text", "csv", "arrow")
MAX_ROW_BYTES = 64 << 20
MAX_CHUNK_BYTES = 1 << 30  # of a column of a Parquet row group, unpacked
CHUNK_CHARACTERS = 1 << 16
# How many times the needed text is read at most, to take the blocks evenly from it.
SPREAD = 8
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# A single space goes with the word behind it, as tokenizers have it: the pieces give the tokens of the whole.
_CUTS = (re.compile(r".*\S(?= \S)", re.DOTALL), re.compile(r".*\n", re.DOTALL))


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a file, the id of a hub data set, or ``self`` (the model's own samples).

    ``format`` None decides by suffix; a name that is no file and has no known suffix is a hub id. ``field``
    names the text in a row; ``split`` and ``config`` choose a part of a hub data set.
    """

    source: str
    format: Format | None = None
    field: str = "text"
    split: str = "train"
    config: str | None = None

    def __post_init__(self) -> None:
        if self.format not in (None, *get_args(Format)):
            raise InvalidSetting(f"format must be one of {', '.join(get_args(Format))}, not {self.format!r}")

    def resolved_format(self) -> Format:
        """The format to read; raises InvalidDataset where neither suffix nor name tells it."""
        path = Path(self.source)
        if self.format is not None or self.source == "self":
            return self.format or "self"
        if path.suffix.lower() in SUFFIXES:
            return SUFFIXES[path.suffix.lower()]
        if path.is_dir():
            raise InvalidDataset(f"{path} is a folder: name one file in it")
        if path.exists():
            raise InvalidDataset(f"the suffix of {path} tells no format: say jsonl, text or parquet")
        if _HUB_ID.fullmatch(self.source):
            return "hub"
        raise InvalidDataset(f"{path} does not exist")


@dataclass(frozen=True)
class TextMixture:
    """Several texts, with an equal number of blocks from each (the first ones have one more where it does not divide).

    Bases fitted on one domain cost far more on another, so a model that serves several wants a mixture.

    Raises:
        InvalidSetting: there are fewer than two parts, or one is named twice.
    """

    parts: tuple[TextSource, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise InvalidSetting(f"a mixture needs at least 2 texts, not {len(self.parts)}")
        for part in self.parts:
            if self.parts.count(part) > 1:
                raise InvalidSetting(f"the mixture names {part.source} twice")

    @property
    def source(self) -> str:
        return " + ".join(part.source for part in self.parts)

    def shares(self, num_samples: int) -> list[int]:
        """Blocks of each part; InvalidSetting where there are fewer blocks than parts."""
        count = len(self.parts)
        if num_samples < count:
            raise InvalidSetting(f"{num_samples} samples cannot be shared among {count} texts")
        return [num_samples // count + (i < num_samples % count) for i in range(count)]


def read_texts(source: TextSource) -> Iterator[str]:
    """The texts of ``source`` in order, none of them empty; plain text comes in chunks of it.

    Raises:
        InvalidDataset: at once where the file is missing, empty or a folder; at a row that is not UTF-8 or
            JSON, or whose field is missing or no string; at the end where no row held text.
        InvalidSetting: the source is ``self``.
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
    """The text of row ``number`` (from 1)."""
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
                end = _cut(pending, CHUNK_CHARACTERS)
                yield pending[:end]
                pending = pending[end:]
    yield "" if pending.isspace() else pending


def _cut(text: str, limit: int) -> int:
    """Where a piece of at most ``limit`` characters ends: between words, else after a line, else there."""
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
    builders = _extra("datasets.packaged_modules", source)._PACKAGED_DATASETS_MODULES
    if not _HUB_ID.fullmatch(name) or name in builders:
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
        raise InvalidDataset(f"{name} is no file, and no hub data set that can be read: {reason}") from error


def _extra(module: str, source: TextSource) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidDataset(f"reading {source.source} needs pip install 'orthokv[datasets]'") from error


def evenly(count: int, wanted: int) -> list[int]:
    """``min(wanted, count)`` indices spread evenly over ``range(count)``: every part of a text or mixture has its share."""
    wanted = min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def starts_over(positions: int, length: int, count: int) -> list[int]:
    """Where ``count`` blocks of ``length`` tokens begin so that together they cover positions ``0..positions - 1``.

    At as many places as blocks laid end to end would need (``count``, where that is fewer), evenly from 0 to ``positions -
    length``: with fewer, the positions between them are served worse (decision 10). All have equally many blocks, in an
    order that gives neighbours and evenly spaced blocks different ones: errors are measured on a few evenly spaced blocks,
    and each text of a mixture is a run of them.
    """
    places = min(count, -(-positions // length))
    starts = [place * (positions - length) // max(places - 1, 1) for place in range(places)]
    # Multiples of an irrational number, modulo 1, are spread evenly, and so are those of each step and run.
    order = sorted(range(count), key=lambda i: i * math.sqrt(2) % 1)
    return [starts[rank * places // count] for _, rank in sorted(zip(order, range(count), strict=True))]


class Block(NamedTuple):
    """Token ids, int64 ``[T]``, and the position of the first."""

    tokens: torch.Tensor
    start: int = 0


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed text. ``tokens``: int64 ``[num_samples, sequence_length]``, on the CPU.

    ``digest`` is the hex sha256 over shape and token ids, both little-endian int64. ``source`` says
    where the text came from. ``starts`` holds the position of each sample's first token: 0 unless :meth:`placed` put it
    elsewhere. It says how a text is used, not which text it is, so the digest leaves it out.
    """

    tokens: torch.Tensor
    digest: str
    source: str
    starts: tuple[int, ...]

    @classmethod
    def of(cls, tokens: torch.Tensor, source: str) -> Blocks:
        """Blocks of ``tokens`` with their digest; raises InvalidDataset for another shape or dtype."""
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.numel() == 0:
            shape = f"{tokens.dtype} {list(tokens.shape)}"
            raise InvalidDataset(f"token blocks must be torch.int64 [samples, length], not {shape}")
        tokens = tokens.detach().cpu().contiguous()
        content = hashlib.sha256(struct.pack("<2q", *tokens.shape))
        content.update(tokens.numpy().astype("<i8", copy=False).data)
        return cls(tokens, content.hexdigest(), source, (0,) * len(tokens))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> Block:
        return Block(self.tokens[index], self.starts[index])

    def __iter__(self) -> Iterator[Block]:
        return map(Block, self.tokens, self.starts)

    @property
    def positions(self) -> int:
        """The positions that the samples reach: ``0..positions - 1``."""
        return max(self.starts) + self.tokens.shape[1]

    def placed(self, starts: Sequence[int]) -> Blocks:
        """The same samples, begun at other positions; raises InvalidSetting unless there is one, from 0, for each."""
        if len(starts) != len(self) or min(starts) < 0:
            raise InvalidSetting(f"{len(self)} samples cannot begin at positions {list(starts)}")
        return replace(self, starts=tuple(starts))

    def spread(self, positions: int, holdout: int) -> Blocks:
        """The same samples, begun all over ``0..positions - 1``: so are both parts of :meth:`split`."""
        length, held = self.tokens.shape[1], evenly(len(self), holdout)
        parts = [starts_over(positions, length, n) for n in (len(self) - len(held), len(held))]
        fitting, held_out = map(iter, parts)
        return self.placed([next(held_out) if i in held else next(fitting) for i in range(len(self))])

    def take(self, indices: Sequence[int]) -> Blocks:
        """The samples at ``indices``, in that order."""
        return Blocks.of(self.tokens[list(indices)], self.source).placed([self.starts[i] for i in indices])

    def split(self, holdout: int) -> tuple[Blocks, Blocks]:
        """All but ``holdout`` evenly spaced samples, and those; raises InvalidSetting where one part is empty."""
        if not 1 <= holdout < len(self):
            raise InvalidSetting(f"a holdout of {holdout} leaves one part of {len(self)} samples empty")
        held = evenly(len(self), holdout)
        kept = sorted(set(range(len(self))) - set(held))
        return self.take(kept), self.take(held)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; raises StorageError."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            # One key: several would come in another order in every process, and the file in other bytes.
            described = json.dumps({"digest": self.digest, "source": self.source, "starts": self.starts})
            save_file({"tokens": self.tokens}, partial, {"orthokv": described})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise StorageError(f"token blocks cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Blocks:
        """Read what :meth:`save` wrote; raises InvalidDataset where it is missing, truncated or altered."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tokens = file.get_tensor("tokens")
            described = json.loads(metadata["orthokv"])
            digest, source = described["digest"], described["source"]
            starts = described.get("starts")  # a file of before there were any
        except (KeyError, ValueError) as error:
            raise InvalidDataset(f"{path} holds no token blocks: {error} is missing") from error
        except (OSError, SafetensorError) as error:
            raise InvalidDataset(f"token blocks {path} cannot be read: {error}") from error
        blocks = cls.of(tokens, source)
        if blocks.digest != digest:
            raise InvalidDataset(f"token blocks {path} were altered: their digest is not {digest}")
        if starts is None:
            return blocks
        if not isinstance(starts, list) or not all(type(start) is int for start in starts):
            raise InvalidDataset(f"token blocks {path} begin at {starts!r}, which are no positions")
        try:
            return blocks.placed(starts)
        except InvalidSetting as error:
            raise InvalidDataset(f"token blocks {path}: {error}") from error


def load_blocks(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    sequence_length: int,
    max_positions: int | None = None,
) -> Blocks:
    """Read and pack ``source``; see :func:`read_texts` and :func:`pack` (``self``: :func:`self_text`).

    Up to :data:`SPREAD` times as much text as needed is read and the blocks are taken evenly from it: consecutive blocks of
    one long document say much less about a text than as many blocks of different documents.
    """
    _check_shape(num_samples, sequence_length, max_positions)  # before a download starts
    return pack(
        read_texts(source),
        tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length,
        spread=SPREAD,
        # A file of plain text is one document, whatever chunks it is read in.
        separate=source.resolved_format() != "text",
        source=source.source,
    )


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    sequence_length: int,
    max_positions: int | None = None,
    separate: bool = True,
    spread: int = 1,
    source: str = "text",
) -> Blocks:
    """Tokenise texts in reading order, join them and cut the stream into blocks; stop once there are enough.

    With ``separate`` one token stands between two texts: BOS, else EOS, where the tokenizer has one; no other
    special token is added. With ``spread`` above 1, up to that many times ``num_samples`` blocks are made and the result
    is taken evenly from them. ``source`` names the text in errors and in the result.

    Raises:
        InvalidDataset: there are too few tokens.
        InvalidSetting: the shape is out of range.
    """
    _check_shape(num_samples, sequence_length, max_positions)
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    needed = num_samples * sequence_length
    most = spread * needed
    stream = array("q")
    for index, text in enumerate(texts):
        if index and separate and isinstance(mark, int):
            stream.append(mark)
        while text and len(stream) < most:
            end = len(text) if len(text) <= CHUNK_CHARACTERS else _cut(text, CHUNK_CHARACTERS)
            stream.extend(tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"])
            text = text[end:]
        if len(stream) >= most:
            break
    if len(stream) < needed:
        found = f"{len(stream)} token{'' if len(stream) == 1 else 's'}"
        raise InvalidDataset(
            f"{source} holds {found}; {num_samples} x {sequence_length} = {needed} are needed"
        )
    count = min(len(stream), most) // sequence_length
    tokens = torch.frombuffer(stream, dtype=torch.int64)[: count * sequence_length].view(
        count, sequence_length
    )
    return Blocks.of(tokens[evenly(count, num_samples)], source)


def _check_shape(num_samples: int, sequence_length: int, max_positions: int | None) -> None:
    if num_samples < 1:
        raise InvalidSetting(f"num_samples must be at least 1, not {num_samples}")
    if sequence_length < 2:
        raise InvalidSetting(f"sequence_length must be at least 2, not {sequence_length}")
    if max_positions is not None and sequence_length > max_positions:
        raise InvalidSetting(f"sequence_length {sequence_length} exceeds the model's {max_positions}")


# Samples that one forward of self_text draws a token for: one token of a few samples leaves a GPU idle.
_SAMPLES_TOGETHER = {"cuda": 64}


@torch.no_grad()
def self_text(
    model: PreTrainedModel,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    batch_size: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Blocks:
    """Blocks that the model samples itself from BOS, with its own cache; EOS is never drawn.

    The random numbers depend on ``seed`` and the sample only, neither on ``batch_size`` nor on the global
    generator, which is left alone. By default as many samples are drawn together as the device is good for. ``progress`` is
    called with tokens drawn and tokens in all.

    Raises:
        InvalidDataset: the model has no BOS token.
        InvalidSetting: a setting is out of range.
        InvalidModel: its logits are not finite.
    """
    config = model.config.get_text_config(decoder=True)
    _check_shape(num_samples, sequence_length, getattr(config, "max_position_embeddings", None))
    if batch_size is None:
        batch_size = _SAMPLES_TOGETHER.get(model.device.type, 8)
    if batch_size < 1 or not temperature > 0 or (top_k is not None and top_k < 1):
        given = f"{batch_size}, {temperature} and {top_k}"
        raise InvalidSetting(f"batch_size, temperature and top_k must be above 0, not {given}")
    if not isinstance(bos := getattr(config, "bos_token_id", None), int):
        raise InvalidDataset("the model's configuration has no bos_token_id, so it cannot write its own text")
    stops = [getattr(settings, "eos_token_id", None) for settings in (config, model.generation_config)]
    ends = [end for stop in stops for end in (stop if isinstance(stop, list) else [stop]) if end is not None]
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32 and widened, so that no number reaches 1 and no draw falls behind the last token.
    uniform = torch.rand(num_samples, sequence_length - 1, generator=generator).double()
    tokens = torch.full((num_samples, sequence_length), bos)
    total = uniform.numel()
    training = model.training
    model.train(mode=False)
    try:
        for start in range(0, num_samples, batch_size):
            rows, draws = tokens[start : start + batch_size], uniform[start : start + batch_size]
            cache = None
            for position in range(1, sequence_length):
                step = rows[:, position - 1 : position].to(model.device)
                with repeatable():
                    output = cast(Any, model)(input_ids=step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                # Drawn on the CPU: sums over a vocabulary come out differently from run to run on a GPU.
                logits = output.logits[:, -1].float().cpu().double() / temperature
                rows[:, position] = _draw(logits, draws[:, position - 1 : position], ends, top_k)
                if progress is not None:
                    progress(start * (sequence_length - 1) + position * len(rows), total)
    finally:
        model.train(training)
    return Blocks.of(tokens, f"self (seed {seed})")


def _draw(logits: torch.Tensor, uniform: torch.Tensor, never: list[int], top_k: int | None) -> torch.Tensor:
    """A token a row, by inverting the cumulative distribution: ``[n, vocabulary]``, ``[n, 1]`` -> ``[n]``."""
    logits[:, never] = -torch.inf
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    heights = logits.softmax(-1).cumsum(-1)
    if not heights.isfinite().all():
        raise InvalidModel("the model's logits are not finite, so it cannot write its own text")
    return torch.searchsorted(heights, uniform * heights[:, -1:], right=True)[:, 0]
