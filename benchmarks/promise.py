"""Does a perplexity budget hold on text that nobody has seen? Asked against reached, over budgets and seeds.

    python -m benchmarks.promise MODEL --text FILE --seeds 0,1,2,3,4 --out results.json

A seed deals the blocks of one text into calibration and evaluation, fits, and plans for every budget on the held-out eighth of
the calibration. The share of cases in which the increase on the evaluation blocks stays within 1.2 times what was asked is
the last line; it is to be 95 %.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.bench import Bench
from orthokv.attention import Seam
from orthokv.budget import Budget
from orthokv.compare import MethodChoice
from orthokv.errors import BudgetUnreachable
from orthokv.evaluate import quality
from orthokv.pipeline import FitSettings, device_name, make_plan, planned_bases

WITHIN = 1.2


@dataclass(frozen=True)
class Case:
    """One budget at one seed: increases of perplexity, relative. A budget that cannot be promised has no plan."""

    seed: int
    asked: float
    kept: float | None
    held_out: float | None
    bound: float | None
    reached: float | None

    @property
    def holds(self) -> bool:
        return self.reached is None or self.reached <= WITHIN * self.asked


def run(
    bench: Bench, text: str, seed: int, budgets: list[float], settings: FitSettings, choice: MethodChoice
) -> list[Case]:
    every = bench.evaluation(text, 2 * settings.num_samples, settings.sequence_length)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    calibration = every.take(order[: settings.num_samples])
    evaluation = every.take(order[settings.num_samples :])
    chosen = choice.settings(replace(settings, seed=seed))
    profile, _ = bench.profile(calibration, choice, chosen, None)
    _, held_out = calibration.split(chosen.holdout)
    cases: list[Case] = []
    for asked in budgets:
        try:
            plan, found = make_plan(
                profile, Budget("perplexity_increase", asked), model=bench.model, held_out=held_out
            )
        except BudgetUnreachable:
            cases.append(Case(seed, asked, None, None, None, None))
            continue
        assert found is not None
        with Seam(bench.model, profile.key_mode) as seam:
            reached = quality(seam, planned_bases(bench.model, profile, plan), evaluation).increase
        cases.append(Case(seed, asked, plan.kept, found.increase, found.bound, reached))
        print(
            f"seed {seed}: asked {asked:.3f}, kept {plan.kept:.3f}, held-out {found.increase:.4f} "
            f"(bound {found.bound:.4f}), unseen {reached:.4f}",
            flush=True,
        )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--method", default="weighted:joint", help="method:sharing, as in `orthokv compare`")
    parser.add_argument("--budgets", default="0.01,0.02,0.05,0.1,0.2,0.5")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    bench = Bench.load(arguments.model, arguments.device)
    choice = MethodChoice.parse(arguments.method)
    settings = FitSettings("stiefel", num_samples=arguments.samples, sequence_length=arguments.length)
    budgets = [float(part) for part in arguments.budgets.split(",")]
    cases: list[Case] = []
    for seed in map(int, arguments.seeds.split(",")):
        cases += run(bench, arguments.text, seed, budgets, settings, choice)
        planned = [case for case in cases if case.reached is not None]
        share = sum(case.holds for case in planned) / max(len(planned), 1)
        if arguments.out is not None:
            found = {
                "model": bench.name,
                "text": Path(arguments.text).name,
                "method": arguments.method,
                "num_samples": arguments.samples,
                "sequence_length": arguments.length,
                "device": device_name(bench.model.device),
                "within": WITHIN,
                "share": share,
                "cases": [asdict(case) for case in cases],
            }
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{share:.1%} of {len(planned)} plans within {WITHIN} x what was asked; {len(cases) - len(planned)} refused"
    )


if __name__ == "__main__":
    main()
