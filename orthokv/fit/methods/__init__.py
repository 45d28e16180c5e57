"""Methods that fit bases. The registry is :data:`METHODS`: a name, and the dataclass behind it."""

from __future__ import annotations

from orthokv.fit.methods.base import FittedBases, Method
from orthokv.fit.methods.eigen import Eigen
from orthokv.fit.methods.oblique import Oblique
from orthokv.fit.methods.palu import Palu
from orthokv.fit.methods.stiefel import Stiefel
from orthokv.fit.methods.weighted import Weighted
from orthokv.spec.errors import InvalidSetting

METHODS: dict[str, type[Eigen] | type[Palu] | type[Stiefel] | type[Weighted] | type[Oblique]] = {
    "eigen": Eigen,
    "stiefel": Stiefel,
    "weighted": Weighted,
    "oblique": Oblique,
    "palu": Palu,
}

__all__ = [
    "METHODS",
    "Eigen",
    "FittedBases",
    "Method",
    "Oblique",
    "Palu",
    "Stiefel",
    "Weighted",
    "make_method",
]


def make_method(name: str, **settings: object) -> Method:
    """A method by name, with those of ``settings`` that are not None.

    Raises:
        InvalidSetting: unknown method, or a setting that it does not have, or that cannot be.
    """
    method = METHODS.get(name)
    if method is None:
        raise InvalidSetting(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = given.keys() - method.__dataclass_fields__.keys()
    if unknown:
        raise InvalidSetting(f"method {name!r} has no setting {', '.join(sorted(unknown))}")
    try:
        return method(**given)  # type: ignore[arg-type]
    except TypeError as error:  # a word where a number belongs
        raise InvalidSetting(f"method {name!r}: {error}") from error
