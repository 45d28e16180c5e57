"""What the quality benchmarks share: a model, its texts as blocks, and a result file that a broken run continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from orthokv.compare import MethodChoice, fit_profile
from orthokv.models.loading import load
from orthokv.models.source import ModelSource, load_tokenizer, resolve_model
from orthokv.pipeline import prepare_blocks
from orthokv.planning.profile import ErrorProfile
from orthokv.show.progress import PlainReporter
from orthokv.show.results import ComparisonRow
from orthokv.spec.settings import FitSettings
from orthokv.text.blocks import Blocks
from orthokv.text.packing import load_blocks
from orthokv.text.source import TextMixture, TextSource

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"
MODEL = SHARED / "models" / "books-llama-31m"
CALIBRATION = (
    str(SHARED / "data" / "books-calib.jsonl"),
    str(SHARED / "data" / "wikitext2-train-part.txt"),
    "self",
)
TEXTS = {
    "books-eval": str(SHARED / "data" / "books-eval.jsonl"),
    "docs-eval": str(SHARED / "data" / "docs-eval.jsonl"),
    "wikitext2-test": str(SHARED / "data" / "wikitext2-test.txt"),
}


def need_shared(*paths: str) -> None:
    """End with a plain line where the bench models and texts are not beside the checkout."""
    missing = [path for path in paths if str(SHARED) in path and not Path(path).exists()]
    if missing:
        print(f"nothing measured: {missing[0]} is not there (see benchmarks/README.md)", file=sys.stderr)
        sys.exit(0)


@dataclass
class Bench:
    """A loaded model and everything that is made from text once."""

    source: ModelSource
    model: PreTrainedModel

    @classmethod
    def load(cls, model: str, device: str, dtype: str | None = None) -> Bench:
        source = resolve_model(model)
        return cls(source, load(source, device, None if dtype is None else getattr(torch, dtype)))

    @property
    def name(self) -> str:
        return Path(self.source.id).name

    def calibration(self, parts: Sequence[str], settings: FitSettings, keep: Path | None = None) -> Blocks:
        """Blocks of one text, or of several in equal parts.

        Args:
            keep: a file that holds them between runs: what a model writes itself differs between devices.
        """
        if keep is not None and keep.is_file():
            return Blocks.load(keep)
        texts = tuple(TextSource(part) for part in parts)
        text = texts[0] if len(texts) == 1 else TextMixture(texts)
        blocks = prepare_blocks(self.source, text, settings, self.model, PlainReporter())
        if keep is not None:
            blocks.save(keep)
        return blocks

    def evaluation(self, path: str, samples: int, length: int) -> Blocks:
        found = load_blocks(
            TextSource(path), load_tokenizer(self.source), num_samples=samples, sequence_length=length
        )
        return replace(found, source=Path(path).name)

    def profile(
        self, blocks: Blocks, choice: MethodChoice, settings: FitSettings, folder: Path | None
    ) -> tuple[ErrorProfile, float]:
        """Fit, or read back what an earlier run fitted; and the seconds that the fit took."""
        if folder is not None and (folder / "seconds.json").is_file():
            return ErrorProfile.load(folder), float(json.loads((folder / "seconds.json").read_text()))
        profile, seconds = fit_profile(self.model, self.source, blocks, choice.settings(settings))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            profile.save(folder)
            (folder / "seconds.json").write_text(json.dumps(seconds))
        return profile, seconds


@dataclass
class Results:
    """A JSON file of rows, written after each of them.

    `header` says what all rows have in common; `refused` what could not be measured, and why.
    """

    path: Path
    header: dict[str, Any]
    rows: list[dict[str, Any]]
    refused: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> Results:
        """Continue a file, or begin it; ends the program where the file was measured under another header."""
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls(path, header, [], [])
        data = json.loads(path.read_text())
        differing = [key for key in header if data["header"].get(key) != header[key]]
        if differing:
            sys.exit(f"{path} was measured with another {', '.join(differing)}: name another --out")
        return cls(path, header, data["rows"], data["refused"])

    def has(self, **wanted: Any) -> bool:
        """Whether these are measured, or known to be refused."""
        return any(
            all(key not in entry or entry[key] == value for key, value in wanted.items())
            for entry in self.refused
        ) or any(all(entry.get(key) == value for key, value in wanted.items()) for entry in self.rows)

    def add(self, row: ComparisonRow, **labels: Any) -> None:
        self.rows.append({**labels, **row.to_dict()})
        self.save()
        print(
            f"{row.method}:{row.sharing} {row.key_mode} seed {row.seed} {row.allocation} "
            f"{row.kept_asked:g} {row.text}: {row.ratio:.4f} x dense",
            flush=True,
        )

    def refuse(self, reason: str, **what: Any) -> None:
        """Note what cannot be measured; keys that are left out stand for all their values."""
        self.refused.append({**what, "reason": reason})
        self.save()
        print(f"{', '.join(map(str, what.values()))}: {reason}", flush=True)

    def save(self) -> None:
        data = {"header": self.header, "rows": self.rows, "refused": self.refused}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n")
        partial.replace(self.path)


def rows_of(entries: Sequence[dict[str, Any]]) -> list[ComparisonRow]:
    """Rows of a result file, without their labels."""
    names = {field.name for field in fields(ComparisonRow)}
    return [ComparisonRow(**{k: v for k, v in entry.items() if k in names}) for entry in entries]


def named_files(given: Sequence[str]) -> dict[str, str]:
    """`name=file` options as a dict; a bare file is named by itself."""
    pairs = [text.partition("=") for text in given]
    return {(name if file else Path(name).stem): (file or name) for name, _, file in pairs}


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
