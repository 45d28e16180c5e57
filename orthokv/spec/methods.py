"""What each method is called and may be told. How it fits bases stands in `orthokv.fit.methods`, on top of these.

A method's settings are a frozen dataclass; what is a fact of the method and not a setting is a class variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast, get_args

from orthokv.spec.errors import InvalidSetting
from orthokv.spec.vocabulary import Parameterisation, Retraction, Start, Statistics


@dataclass(frozen=True)
class MethodSettings:
    """Facts of every method.

    Attributes:
        name: what a user calls it.
        matrices: of a basis: 1 where encoder and decoder are one orthonormal matrix, 2 where they differ.
        spectra: singular values are kept beside the bases.
        refine_steps: steps of the last stage (`orthokv.fit.refine`) where nothing else is asked for.
    """

    name: ClassVar[str]
    matrices: ClassVar[int] = 1
    spectra: ClassVar[bool] = False
    refine_steps: ClassVar[int] = 0


@dataclass(frozen=True)
class EigenSettings(MethodSettings):
    """`statistics`: `k` is what the released code does for Llama, keys only, pooled over the heads; `kq` is the paper's form:
    keys stacked with the queries that read them, so that both fit the basis.
    """

    name: ClassVar[str] = "eigen"
    spectra: ClassVar[bool] = True
    statistics: Statistics = "k"

    def __post_init__(self) -> None:
        if self.statistics not in get_args(Statistics):
            raise InvalidSetting(f"statistics must be 'k' or 'kq', not {self.statistics!r}")


@dataclass(frozen=True)
class StiefelSettings(MethodSettings):
    """Settings of orthonormal bases that are learned through the whole decoder layer.

    Attributes:
        parameterisation: `direct` moves the point itself, from a closed-form start. `predictor` is the paper's: an MLP maps
            the mean and variance of the activations to a matrix whose QR factor is the basis.
        steps: optimiser steps a layer (`direct`).
        epochs: largest number of passes over the blocks (`predictor`; the paper's 50).
        step_size: how far a column turns in a step at the start, in radians, about (`direct`).
        start: where `direct` starts: the singular vectors (`eigen`), the orthonormalised weighted closed form
            (`weighted`), or, to see what a start is worth, anywhere (`random`).
        retraction: a key of `orthokv.bases.manifold.RETRACTIONS`.
        share: None trains every rank in turn; a share of the widths trains that rank alone (`direct`).
    """

    name: ClassVar[str] = "stiefel"
    parameterisation: Parameterisation = "direct"
    steps: int = 200
    epochs: int = 50
    step_size: float = 0.05
    start: Start = "eigen"
    retraction: str = "cholesky"
    share: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.parameterisation not in get_args(Parameterisation):
            raise InvalidSetting(
                f"parameterisation must be 'direct' or 'predictor', not {self.parameterisation!r}"
            )
        if not self.step_size > 0:
            raise InvalidSetting(f"step_size must be above 0, not {self.step_size}")
        _check_share(self.share)
        if self.start not in get_args(Start):
            raise InvalidSetting(f"start must be one of {', '.join(get_args(Start))}, not {self.start!r}")
        if self.retraction not in get_args(Retraction):
            raise InvalidSetting(
                f"retraction must be one of {', '.join(get_args(Retraction))}, not {self.retraction!r}"
            )


@dataclass(frozen=True)
class WeightedSettings(MethodSettings):
    """A closed form: nothing to set."""

    name: ClassVar[str] = "weighted"
    matrices: ClassVar[int] = 2


@dataclass(frozen=True)
class ObliqueSettings(MethodSettings):
    """Settings of learned oblique projectors.

    Attributes:
        steps: optimiser steps a layer.
        step_size: how far a column turns in a step at the start, in radians, about.
        share: None trains every rank in turn; a share of the widths trains that rank alone, which shows what nesting costs.
    """

    name: ClassVar[str] = "oblique"
    matrices: ClassVar[int] = 2
    refine_steps: ClassVar[int] = 400
    steps: int = 200
    step_size: float = 0.007
    share: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InvalidSetting(f"steps must be at least 1, not {self.steps}")
        if not self.step_size > 0:
            raise InvalidSetting(f"step_size must be above 0, not {self.step_size}")
        _check_share(self.share)


@dataclass(frozen=True)
class PaluSettings(MethodSettings):
    """`whitened`: False takes the SVD of the weights alone, which needs no text."""

    name: ClassVar[str] = "palu"
    spectra: ClassVar[bool] = True
    whitened: bool = True


METHODS: dict[str, type[MethodSettings]] = {
    kind.name: kind
    for kind in (EigenSettings, StiefelSettings, WeightedSettings, ObliqueSettings, PaluSettings)
}


def method_settings(name: str, **settings: object) -> MethodSettings:
    """The settings of a method by its name, with those of `settings` that are not None.

    Raises:
        InvalidSetting: unknown method, or a setting that it does not have, or that cannot be.
    """
    kind = METHODS.get(name)
    if kind is None:
        raise InvalidSetting(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = given.keys() - kind.__dataclass_fields__.keys()
    if unknown:
        raise InvalidSetting(f"method {name!r} has no setting {', '.join(sorted(unknown))}")
    try:
        return kind(**given)
    except TypeError as error:  # a word where a number belongs
        raise InvalidSetting(f"method {name!r}: {error}") from error


def default_steps(name: str) -> int:
    """Optimiser steps a layer where nothing else is asked for; 0 of a closed form."""
    field = METHODS[name].__dataclass_fields__.get("steps")
    return 0 if field is None else int(cast(int, field.default))


def _check_share(share: float | None) -> None:
    """Refuse a share of the widths outside (0, 1]; None trains all ranks."""
    if share is not None and not 0 < share <= 1:
        raise InvalidSetting(f"share must be in (0, 1], not {share:g}")
