"""Where text comes from, as a value: a file, a hub data set, the model itself, or several of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from orthokv.spec.errors import InvalidDataset, InvalidSetting
from orthokv.spec.hub_ids import is_hub_id

Format = Literal["jsonl", "text", "parquet", "hub", "self"]


SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}


SUFFIXES |= {".txt": "text", ".md": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a file, the id of a hub data set, or `self` (the model's own samples).

    Attributes:
        source: a path, an id, or `self`.
        format: `jsonl`, `text`, `parquet`, `hub` or `self`; None decides by suffix, and takes a name that is not a file and has
            no known suffix for a hub id.
        field: of a row, the field that holds the text.
        split: the part of a hub data set.
        config: the configuration of a hub data set, where it has several.
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
        """The format to read; raises `InvalidDataset` where neither suffix nor name tells it."""
        path = Path(self.source)
        if self.format is not None or self.source == "self":
            return self.format or "self"
        if path.suffix.lower() in SUFFIXES:
            return SUFFIXES[path.suffix.lower()]
        if path.is_dir():
            raise InvalidDataset(f"{path} is a folder: name one file in it")
        if path.exists():
            raise InvalidDataset(f"the suffix of {path} tells no format: say jsonl, text or parquet")
        if is_hub_id(self.source):
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


def text_of(
    dataset: str | Path | TextSource | TextMixture | Sequence[str | Path | TextSource], field: str = "text"
) -> TextSource | TextMixture:
    """What a user calls a dataset: a file, a hub data set id, `self`, or several of these, mixed in equal parts.

    Args:
        field: of a row, where a source is given by its name alone.

    Raises:
        InvalidSetting: there is none, or one is named twice.
    """
    if isinstance(dataset, TextMixture):
        return dataset
    named = [dataset] if isinstance(dataset, (str, Path, TextSource)) else list(dataset)
    if not named:
        raise InvalidSetting("name at least one text")
    parts = tuple(one if isinstance(one, TextSource) else TextSource(str(one), field=field) for one in named)
    return parts[0] if len(parts) == 1 else TextMixture(parts)


def needs_text(source: str) -> None:
    """Refuse `self`: text that the model writes flatters it, so predictions are measured on text that it did not write.

    Raises:
        InvalidSetting: it is `self`.
    """
    if source == "self":
        raise InvalidSetting(
            "measuring needs text that the model did not write itself: name a file or a data set"
        )
