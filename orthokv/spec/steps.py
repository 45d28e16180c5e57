"""Steps of the last stages: those that refine all layers together, and those that polish one plan."""

from __future__ import annotations

from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting

# One plan needs fewer steps than many plans in turn.
POLISH_SHARE = 0.5


def check_steps(name: str, asked: object) -> None:
    """Raises `InvalidSetting` where a number of steps is given that is none."""
    if asked is not None and (type(asked) is not int or asked < 0):
        raise InvalidSetting(f"{name} must be a whole number, at least 0, not {asked!r}")


def check_polish(budget: Budget, asked: int | None) -> None:
    """A budget on layer errors is met by the profile's own bases; the polish looks at predictions, and may break it.

    Raises:
        InvalidSetting: `asked` is not a number of steps, or above 0 with such a budget.
    """
    check_steps("polish_steps", asked)
    if asked and budget.metric == "layer_error":
        raise InvalidSetting(f"polish_steps {asked}: a layer_error budget is not polished")


def polish_steps(refine_steps: int, budget: Budget, asked: int | None) -> int:
    """Steps for a checkpoint of a profile that was refined with `refine_steps`: as asked, or half as many.

    Raises:
        InvalidSetting: see `check_polish`.
    """
    check_polish(budget, asked)
    if budget.metric == "layer_error":
        return 0
    return int(POLISH_SHARE * refine_steps) if asked is None else asked
