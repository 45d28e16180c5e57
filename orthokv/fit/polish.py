"""What a checkpoint gets beyond its profile: bases refined at the ranks of its own plan.

A profile's bases serve every budget, which costs something at each: a fit that may forget all ranks but one is better there.
A short refinement of one plan gets that back, whatever the budget, and the profile stays as it is
(`docs/decisions/0015-polish.md`).
"""

from __future__ import annotations

import logging
from dataclasses import replace

from transformers import PreTrainedModel

from orthokv.fit.refine import CHECKS, Refinement, can_refine, refine, watched_texts
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.progress import Reporter, silent
from orthokv.spec.steps import polish_steps
from orthokv.text.blocks import Blocks

log = logging.getLogger("orthokv")


def polish(
    model: PreTrainedModel,
    profile: ErrorProfile,
    plan: Plan,
    blocks: Blocks,
    asked: int | None = None,
    report: Reporter = silent,
) -> ErrorProfile:
    """The profile with bases refined at the ranks of one plan, on the blocks that it was fitted on.

    Its errors are still those of the old bases: it is for a checkpoint of that plan, not for other plans
    (`orthokv.checkpoint.write.write_checkpoint`). It is the profile itself where there is nothing to do (no steps by
    `polish_steps`, or full ranks, which lose nothing), and where nobody asked for steps and the model is streamed.

    Raises:
        InvalidSetting: see `check_polish`; or `asked` is above 0 with a model that is streamed from disk, or the blocks
            are others than the profile's or lie elsewhere.
        InvalidModel: the divergence is not finite.
    """
    steps = polish_steps(profile.method["refine_steps"], plan.budget, asked)
    full = tuple((layer.key.rank, layer.value.rank) for layer in profile.layers)
    if steps == 0 or plan.ranks == full:
        return profile
    if (blocks.digest, blocks.positions) != (profile.dataset["digest"], profile.dataset["positions"]):
        raise InvalidSetting(
            "a plan is polished on the blocks that its profile was fitted on; these are others"
        )
    if not can_refine(model, polish_steps=asked):
        log.warning("the plan is not polished: that needs the whole model, which is streamed from disk")
        return profile
    fitting, held_out = blocks.split(profile.dataset["held_out"])
    checks = [held_out, *watched_texts(model, blocks, profile.seed)]
    refined, _ = refine(
        model,
        profile,
        fitting,
        checks,
        # To the end: it begins near its optimum, where only the smaller steps of the end are progress.
        Refinement(steps, patience=CHECKS),
        profile.seed,
        lambda step: report(replace(step, phase="polishing")),
        plan=plan,
    )
    return replace(refined, method={**profile.method, "polish_steps": steps})
