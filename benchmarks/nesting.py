"""What it costs that one fit serves every rank: the default method against fits at one budget alone, at the same ranks.

    python -m benchmarks.nesting MODEL --kept 0.5,0.25 --seeds 0,1,2 --out results.json

Both start from the same layer-wise bases and have the same plan; the last stage then trains plans of many budgets in turn, or
the plan of that one budget in every step. What nesting costs is the difference of their increases of perplexity. In between is
what a checkpoint gets: many budgets in turn, then a short polish of its own plan.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.bench import CALIBRATION, MODEL, TEXTS, Bench, need_shared, shares
from orthokv.compare import MethodChoice
from orthokv.fit.polish import polish
from orthokv.fit.refine import Refinement, refine
from orthokv.measure.checkpoint import device_name
from orthokv.measure.quality import quality
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.plan import Plan
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import Seam
from orthokv.show.wording import markdown
from orthokv.spec.budget import Budget
from orthokv.spec.settings import FitSettings
from orthokv.spec.steps import POLISH_SHARE
from orthokv.text.blocks import Blocks

NAMES = {
    "all": "many budgets in turn",
    "polished": "many budgets in turn, then that budget's plan",
    "one": "that budget alone",
}


@dataclass(frozen=True)
class Case:
    """One fit at one budget. `trained` is a key of `NAMES`; `increase` of perplexity is relative."""

    seed: int
    kept: float
    trained: str
    steps: int
    increase: float
    kl: float


def run(
    bench: Bench,
    calibration: Blocks,
    evaluation: Blocks,
    settings: FitSettings,
    budgets: list[float],
    steps: list[int],
) -> list[Case]:
    """All cases of one seed."""
    start, _ = bench.profile(calibration, MethodChoice("oblique", "joint"), settings, None)
    fitting, held_out = calibration.split(settings.holdout)
    plans = {kept: allocate(start, Budget("kept", kept)) for kept in budgets}
    found: list[Case] = []

    def measure(profile: ErrorProfile, trained: str, count: int, kept: float) -> None:
        increase, kl = _quality(bench, profile, plans[kept], evaluation)
        found.append(Case(settings.seed, kept, trained, count, increase, kl))
        print(
            f"seed {settings.seed} kept {kept:g} {trained} {count}: {increase:+.4f}, KL {kl:.4f}", flush=True
        )

    def refined(count: int, plan: Plan | None = None) -> ErrorProfile:
        stage = Refinement(count)
        return refine(bench.model, start, fitting, [held_out], stage, settings.seed, plan=plan)[0]

    for count in steps:
        nested = refined(count)
        for kept in budgets:
            measure(nested, "all", count, kept)
            if count == steps[0]:
                more = int(POLISH_SHARE * count)
                polished = polish(bench.model, nested, plans[kept], calibration, more)
                measure(polished, "polished", count + more, kept)
    for kept in budgets:
        measure(refined(steps[0], plans[kept]), "one", steps[0], kept)
    return found


def _quality(bench: Bench, profile: ErrorProfile, plan: Plan, blocks: Blocks) -> tuple[float, float]:
    with Seam(bench.model, profile.key_mode) as seam:
        found = quality(seam, planned_bases(bench.model, profile, plan), blocks)
    return found.increase, found.kl


def section(data: dict[str, Any]) -> str:
    """The page's table: a line a way of training, means over seeds."""
    cases = [Case(**case) for case in data["cases"]]
    budgets = sorted({case.kept for case in cases}, reverse=True)
    lines: list[list[str]] = []
    for trained, steps in dict.fromkeys((case.trained, case.steps) for case in cases):
        groups = [
            [case for case in cases if (case.trained, case.steps, case.kept) == (trained, steps, kept)]
            for kept in budgets
        ]
        figures = (
            f"{1 + fmean(case.increase for case in group):.4f}, {fmean(case.kl for case in group):.4f}"
            for group in groups
        )
        lines.append([f"{NAMES[trained]}, {steps} steps", *figures])
    head = ("last stage trains", *(f"{100 * kept:g} % kept: x dense, KL" for kept in budgets))
    seeds = len({case.seed for case in cases})
    said = (
        f"Model `{data['model']}`, calibrated on {data['num_samples']} x {data['sequence_length']} tokens of "
        f"{data['calibration']}, evaluated on {data['text']}; means of {seeds} seeds. Device: {data['device']}."
    )
    return f"{said}\n\n{markdown(head, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--calibration", default=CALIBRATION[0])
    parser.add_argument("--eval", default=TEXTS["books-eval"])
    parser.add_argument("--kept", default="0.5,0.25")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--steps", default="400,1600", help="of the last stage; fits of one budget have the first"
    )
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    need_shared(given.model, given.calibration, given.eval)
    bench = Bench.load(given.model, given.device)
    settings = FitSettings(
        "oblique", num_samples=given.num_samples, sequence_length=given.sequence_length, refine_steps=0
    )
    calibration = bench.calibration([given.calibration], settings)
    evaluation = bench.evaluation(given.eval, given.eval_samples, given.sequence_length)
    steps = [int(part) for part in given.steps.split(",")]
    cases: list[Case] = []
    for seed in map(int, given.seeds.split(",")):
        cases += run(bench, calibration, evaluation, replace(settings, seed=seed), shares(given.kept), steps)
        if given.out is not None:
            found = {
                "model": bench.name,
                "calibration": calibration.source,
                "text": evaluation.source,
                "num_samples": given.num_samples,
                "sequence_length": given.sequence_length,
                "device": device_name(bench.model.device),
                "cases": [asdict(case) for case in cases],
            }
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
