"""Methods that fit bases. The registry is `METHODS`: a name, and the dataclass behind it."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from orthokv.fit.methods.base import FittedBases, Method
from orthokv.fit.methods.eigen import Eigen
from orthokv.fit.methods.oblique import Oblique
from orthokv.fit.methods.palu import Palu
from orthokv.fit.methods.stiefel import Stiefel
from orthokv.fit.methods.weighted import Weighted
from orthokv.spec.methods import MethodSettings, method_settings

METHODS: dict[str, type[MethodSettings]] = {
    kind.name: kind for kind in (Eigen, Stiefel, Weighted, Oblique, Palu)
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
    """A method by name, ready to fit; see `orthokv.spec.methods.method_settings`."""
    return method_of(method_settings(name, **settings))


def method_of(settings: MethodSettings) -> Method:
    """The method that has these settings."""
    return cast(Method, METHODS[settings.name](**asdict(settings)))
