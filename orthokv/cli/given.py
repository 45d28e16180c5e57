"""What a user gave, as the library has it; whatever cannot be is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.rankgrid import RankGrid
from orthokv.spec.records import BaseModel
from orthokv.spec.settings import default_length

if TYPE_CHECKING:
    from orthokv.models.source import ModelSource


def length(given: int | None, longest: int) -> int:
    return default_length(longest) if given is None else given


def base_of(recorded: BaseModel, model: str | None, revision: str | None) -> ModelSource:
    """The base model that the user names, else the recorded one, at its recorded commit."""
    from orthokv.models.source import recorded_model, resolve_model

    return recorded_model(recorded, revision) if model is None else resolve_model(model, revision=revision)


def check_spill(spill: Path | None) -> None:
    if spill is not None and not spill.is_dir():
        raise InvalidSetting(f"--spill {spill} is not a folder")


def check_plot(plot: Path | None) -> None:
    """Before the work, not after it."""
    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        raise InvalidSetting(f"--plot {plot} is not a file in an existing folder")


def grid(multiple: int, choices: str | None) -> RankGrid:
    try:
        return RankGrid(multiple, tuple(int(part) for part in choices.split(",")) if choices else ())
    except ValueError as error:
        raise InvalidSetting(f"--rank-choices {choices!r}: {error}") from error


def shares(text: str) -> list[float]:
    try:
        return [Budget("kept", float(part)).value for part in text.split(",")]
    except ValueError as error:
        raise InvalidSetting(f"--kept {text!r}: {error}") from error
