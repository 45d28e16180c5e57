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
from statistics import fmean
from typing import Any

import torch

from benchmarks.bench import Bench
from orthokv.compare import MethodChoice
from orthokv.measure.checkpoint import device_name
from orthokv.measure.quality import quality
from orthokv.pipeline import make_plan
from orthokv.planning.bases import planned_bases
from orthokv.runtime.seam import Seam
from orthokv.show.plots.style import INK, MUTED, PALETTE, frame, plain, save
from orthokv.show.wording import markdown, percent
from orthokv.spec.budget import Budget
from orthokv.spec.errors import BudgetUnreachable
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target

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
                profile, Target(Budget("perplexity_increase", asked)), model=bench.model, held_out=held_out
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
        if arguments.out is not None:
            found = {
                "model": bench.name,
                "text": Path(arguments.text).name,
                "method": arguments.method,
                "num_samples": arguments.samples,
                "sequence_length": arguments.length,
                "device": device_name(bench.model.device),
                "within": WITHIN,
                "cases": [asdict(case) for case in cases],
            }
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(summary(cases))


def summary(cases: list[Case]) -> str:
    """How many promises were kept, in a sentence."""
    planned = [case for case in cases if case.reached is not None]
    share = sum(case.holds for case in planned) / max(len(planned), 1)
    refused = len(cases) - len(planned)
    return f"{percent(share)} of {len(planned)} plans stay within {WITHIN} times what was asked; {refused} refused."


def section(data: dict[str, Any]) -> str:
    """The page's table: a line a budget, means over seeds."""
    cases = [Case(**case) for case in data["cases"]]
    lines: list[list[str]] = []
    for asked in sorted({case.asked for case in cases}):
        group = [case for case in cases if case.asked == asked and case.reached is not None]
        if group:
            means = (fmean(found) for found in zip(*map(_figures, group), strict=True))
            worst = max(case.reached or 0.0 for case in group)
            lines.append([percent(asked), str(len(group)), *map(percent, means), percent(worst)])
    head = (
        "asked",
        "seeds",
        "cache kept",
        "increase, held-out",
        "its 95 % bound",
        "increase, unseen",
        "largest",
    )
    said = (
        f"Model `{data['model']}`, `{data['method']}`, {data['num_samples']} x {data['sequence_length']} tokens of "
        f"{data['text']}, as many unseen. Device: {data['device']}. {summary(cases)}"
    )
    return f"{said}\n\n{markdown(head, lines, left=0)}\n"


def _figures(case: Case) -> tuple[float, ...]:
    return tuple(x or 0.0 for x in (case.kept, case.held_out, case.bound, case.reached))


def plot_promise(data: dict[str, Any], path: Path) -> None:
    """Increase asked against increase on unseen text, one point a plan."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cases = [case for case in (Case(**case) for case in data["cases"]) if case.reached is not None]
    figure = frame(
        6.4,
        4.6,
        "A perplexity budget holds on text that nobody has seen",
        f"Increase of perplexity on unseen blocks against the increase that was asked for; {len(cases)} plans of "
        f"{len({case.seed for case in cases})} seeds, {data['model']}, {data['method']}.",
    )
    axes = figure.subplots()
    budgets = sorted({case.asked for case in cases})
    ends = [budgets[0] / 1.3, budgets[-1] * 1.3]
    axes.plot(ends, ends, color=MUTED, linewidth=1.1)
    axes.plot(ends, [WITHIN * x for x in ends], color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.scatter(
        [case.asked for case in cases],
        [case.reached or 0.0 for case in cases],
        s=26,
        color=PALETTE[0],
        zorder=3,
    )
    between = (budgets[0] * budgets[-1]) ** 0.5 / 1.6  # where no point is
    axes.text(
        between, WITHIN * between, f"{WITHIN} x asked  ", size=8.5, color=MUTED, ha="right", va="bottom"
    )
    axes.text(between, between, "  asked", size=8.5, color=MUTED, ha="left", va="top")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(budgets))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("increase asked for", size=9.5, color=INK)
    axes.set_ylabel("increase on unseen text", size=9.5, color=INK)
    plain(axes, grid="both")
    save(figure, path)


if __name__ == "__main__":
    main()
