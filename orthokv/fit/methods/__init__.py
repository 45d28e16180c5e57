"""Methods that fit bases. The registry is `METHODS`: a name, and the dataclass behind it."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import TypeVar, cast

from orthokv.fit.methods.base import FittedBases, Method
from orthokv.fit.methods.eigen import Eigen
from orthokv.fit.methods.oblique import Oblique
from orthokv.fit.methods.palu import Palu
from orthokv.fit.methods.stiefel import Stiefel
from orthokv.fit.methods.weighted import Weighted
from orthokv.spec import methods as spec
from orthokv.spec.errors import InvalidSetting
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
    "method_of",
    "register_method",
]

_BUILT_IN = frozenset(METHODS)
M = TypeVar("M", bound=MethodSettings)


def register_method(kind: type[M]) -> type[M]:
    """Make a method of your own known by its `name`, as a class decorator: `compress(..., method=name)` then uses it.

    Its fields are its settings, which `compress(..., options={...})` sets; `matrices` and `refine_steps` are facts of it. A
    name that is registered again, as in a notebook cell that runs twice, is the newer class's. Checkpoints and profiles that it
    made can be read without it.

    Args:
        kind: a frozen dataclass on `orthokv.spec.methods.MethodSettings` with a class variable `name` and with
            `fit(view, sharing, seed)` (`orthokv.fit.methods.base.Method`).

    Returns:
        The class itself.

    Raises:
        InvalidSetting: it is none, or its name is a built-in method's.
    """
    if not (isinstance(kind, type) and issubclass(kind, MethodSettings) and is_dataclass(kind)):
        raise InvalidSetting(f"a method is a dataclass on MethodSettings, and {kind!r} is not")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not callable(getattr(kind, "fit", None)):
        raise InvalidSetting(f"the method {kind.__name__} needs a class variable 'name' and a function 'fit'")
    if name in _BUILT_IN:
        raise InvalidSetting(f"the name {name!r} of {kind.__name__} is a built-in method's")
    METHODS[name] = spec.METHODS[name] = kind
    return kind


def make_method(name: str, **settings: object) -> Method:
    """A method by name, ready to fit; see `orthokv.spec.methods.method_settings`."""
    return method_of(method_settings(name, **settings))


def method_of(settings: MethodSettings) -> Method:
    """The method that has these settings."""
    return cast(Method, METHODS[settings.name](**asdict(settings)))
