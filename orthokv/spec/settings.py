"""Everything that a fit depends on besides the model and the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orthokv.spec.errors import InvalidSetting
from orthokv.spec.methods import MethodSettings, method_settings
from orthokv.spec.steps import check_steps
from orthokv.spec.vocabulary import KEY_MODES, SHARING_CHOICES, KeyMode, SharingChoice

# One block in eight is held out of the fit: for perplexity budgets, sensitivities and the checkpoint's own figures.
HOLDOUT_SHARE = 8
# Tokens in a block, or the model's longest context where that is shorter.
DEFAULT_LENGTH = 1024
# Blocks that the error surface is measured on.
PROFILE_SAMPLES = 2
# Sequences whose errors are measured one by one, of those that are fitted on and of those held out.
SPREAD_BLOCKS = 8


@dataclass(frozen=True)
class FitSettings:
    """Everything that a fit depends on besides the model and the text.

    Attributes:
        method: a key of `orthokv.spec.methods.METHODS`.
        sharing: which KV heads share a basis: `head`, each has its own; `tied`, keys of all heads have one, values one each;
            `pair`, `quad` and `joint`: every 2, every 4, all together; `auto` chooses among these last for each layer.
        key_mode: keys are cached before (`pre`) or after (`post`) rotary embedding.
        parameterisation, steps, epochs: settings of the method; None takes the method's default.
        refine_steps: steps of the last stage, all layers together (`orthokv.fit.refine`); 0 leaves it out, None takes the
            method's default.
        options: other hyper-parameters of the method, by name.
        propagate: None fits every layer on what the *uncompressed* layers before it produce, so that layers are independent.
            A share of the widths in (0, 1] fits each on what the layers before it produce when they are cut to that share;
            layers can then only be fitted in order, by one worker.
        num_samples, sequence_length: calibration blocks, of which one in eight is held out.
        positions: key mode `post` only, whose bases depend on absolute positions: the blocks are spread over
            `0..positions - 1`, which should be what the checkpoint will serve; None: the model's longest context
            (`docs/decisions/0010-positions-after-rope.md`).
        seed: of everything random.
        profile_samples: blocks on which the error surface is measured.
        batch_size: blocks in one forward of a layer.
    """

    method: str = "oblique"
    sharing: SharingChoice = "joint"
    key_mode: KeyMode = "pre"
    parameterisation: str | None = None
    steps: int | None = None
    epochs: int | None = None
    refine_steps: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    propagate: float | None = None
    num_samples: int = 64
    sequence_length: int = DEFAULT_LENGTH
    positions: int | None = None
    seed: int = 0
    profile_samples: int = PROFILE_SAMPLES
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.sharing not in SHARING_CHOICES:
            raise InvalidSetting(f"sharing must be one of {', '.join(SHARING_CHOICES)}, not {self.sharing!r}")
        if self.key_mode not in KEY_MODES:
            raise InvalidSetting(f"key mode must be one of {', '.join(KEY_MODES)}, not {self.key_mode!r}")
        if self.num_samples < 2:
            raise InvalidSetting(f"num_samples must be at least 2 (one is held out), not {self.num_samples}")
        for name in ("profile_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.positions is not None and self.key_mode != "post":
            raise InvalidSetting(
                f"positions {self.positions} has no effect in key mode {self.key_mode!r}: bases of keys before RoPE "
                f"are the same at every position"
            )
        if self.positions is not None and self.positions < self.sequence_length:
            raise InvalidSetting(
                f"positions must be at least sequence_length ({self.sequence_length}), not {self.positions}"
            )
        if self.propagate is not None and not 0 < self.propagate <= 1:
            raise InvalidSetting(f"propagate must be a share of the widths in (0, 1], not {self.propagate:g}")
        self.method_settings  # noqa: B018  # checks them
        check_steps("refine_steps", self.refine_steps)

    @property
    def method_settings(self) -> MethodSettings:
        """The method's own settings; `InvalidSetting` where it does not have one that was given."""
        own = {"parameterisation": self.parameterisation, "steps": self.steps, "epochs": self.epochs}
        return method_settings(self.method, **{**own, **self.options})

    @property
    def refinement_steps(self) -> int:
        """Steps of the last stage: those asked for, or the method's own."""
        return self.method_settings.refine_steps if self.refine_steps is None else self.refine_steps

    @property
    def holdout(self) -> int:
        """How many of the blocks are held out of the fit."""
        return held_out(self.num_samples)


def held_out(num_samples: int) -> int:
    """How many of the blocks are held out."""
    return max(1, num_samples // HOLDOUT_SHARE)


def default_length(longest: int) -> int:
    """Tokens in a block where nothing else is asked, of a model whose longest context is `longest`."""
    return min(DEFAULT_LENGTH, longest)
