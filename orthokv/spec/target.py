"""What a checkpoint should be: how much may be lost or kept, and in which form."""

from __future__ import annotations

from dataclasses import dataclass

from orthokv.spec.budget import Budget
from orthokv.spec.codec import DEFAULT_CODEC, check_codec
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.rankgrid import FREE, RankGrid
from orthokv.spec.steps import check_polish
from orthokv.spec.vocabulary import ALLOCATIONS, FORMS, Allocation, CodecName, Form


@dataclass(frozen=True)
class Target:
    """Everything that a checkpoint depends on besides its profile.

    Attributes:
        budget: the one number to stay below.
        grid: ranks that may be used.
        allocation: the rule that chooses among them: `knapsack`, `greedy`, `uniform`, or the papers' `pareto` and
            `threshold` (`orthokv.planning.allocate`).
        form: `adapter`: the bases alone; `full`: with the base model's own files.
        codec: how latents are stored: `16-bit`, or `native`, in the model's own dtype.
        polish_steps: steps of a refinement at the chosen ranks; 0 leaves it out, None takes half of the profile's own.

    Raises:
        InvalidSetting: an unknown word, a negative number of steps, or a polish under a budget that never takes one.
    """

    budget: Budget
    grid: RankGrid = FREE
    allocation: Allocation = "knapsack"
    form: Form = "adapter"
    codec: CodecName = DEFAULT_CODEC
    polish_steps: int | None = None

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            raise InvalidSetting(
                f"allocation must be one of {', '.join(ALLOCATIONS)}, not {self.allocation!r}"
            )
        if self.form not in FORMS:
            raise InvalidSetting(f"form must be one of {', '.join(FORMS)}, not {self.form!r}")
        check_codec(self.codec)
        check_polish(self.budget, self.polish_steps)
