"""What each ingredient is worth, one at a time: `python -m benchmarks.ablation --help`.

Every variant changes one thing of the default: `stiefel:joint`, directly optimised from the singular vectors, on
uncompressed inputs, 64 blocks of 1024 tokens of books. Variants that come to the same fit are fitted once. The file is
written after each row and a broken run goes on where it stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.bench import (
    CALIBRATION,
    MODEL,
    RESULTS,
    TEXTS,
    Bench,
    Results,
    named_files,
    need_shared,
    shares,
)
from orthokv.compare import MethodChoice, measure_plan
from orthokv.planning.allocate import allocate
from orthokv.planning.plan import Plan, plan_ranks
from orthokv.planning.profile import ErrorProfile
from orthokv.spec.budget import Budget
from orthokv.spec.methods import default_steps
from orthokv.spec.settings import FitSettings
from orthokv.text.blocks import Blocks

BOOKS, WIKITEXT, _ = CALIBRATION
# Calibration texts by name; several are mixed.
DOMAINS: dict[str, tuple[str, ...]] = {
    "books": (BOOKS,),
    "wikitext": (WIKITEXT,),
    "self": ("self",),
    "mixture": CALIBRATION,
}
Side = Literal["both", "key", "value"]


@dataclass(frozen=True)
class Variant:
    """A fit and how its ranks are chosen. `side` other than None cuts that side to a share of its width, in all layers."""

    method: str = "stiefel:joint"
    calibration: str = "books"
    num_samples: int = 64
    sequence_length: int = 1024
    propagate: float | None = None
    side: Side | None = None

    def labels(self) -> dict[str, Any]:
        """What a row is found by, besides its budget, text and seed."""
        return {
            "variant": self.method,
            "calibration": self.calibration,
            "num_samples": self.num_samples,
            "sequence_length": self.sequence_length,
            "propagate": self.propagate,
            "side": self.side,
        }


# Question -> answers: a label, and the variant that it names.
ABLATIONS: dict[str, dict[str, Variant]] = {
    "parameterisation": {
        f"{sharing}, {kind}": Variant(
            f"stiefel:{sharing}:{kind}" if kind != "direct" else f"stiefel:{sharing}"
        )
        for sharing in ("tied", "joint")
        for kind in ("predictor", "direct")
    },
    "start": {
        f"{sharing}, {start}": Variant(f"stiefel:{sharing}" + (f":start={start}" if start != "eigen" else ""))
        for sharing in ("tied", "joint")
        for start in ("random", "eigen", "weighted")
    },
    "sharing": {sharing: Variant(f"stiefel:{sharing}") for sharing in ("head", "tied", "joint")},
    "side": {
        "keys and values": Variant(side="both"),
        "keys only": Variant(side="key"),
        "values only": Variant(side="value"),
    },
    "nesting": {
        "all ranks": Variant(side="both"),
        "50 % alone": Variant("stiefel:joint:share=0.5", side="both"),
        "25 % alone": Variant("stiefel:joint:share=0.25", side="both"),
    },
    "inputs": {
        "uncompressed": Variant(),
        "compressed to 50 %": Variant(propagate=0.5),
        "compressed to 25 %": Variant(propagate=0.25),
        "eigen, uncompressed": Variant("eigen:joint"),
        "eigen, compressed to 25 %": Variant("eigen:joint", propagate=0.25),
    },
    "samples": {str(n): Variant(num_samples=n) for n in (8, 16, 32, 64, 128)},
    "length": {
        f"{65536 // length} x {length}": Variant(num_samples=65536 // length, sequence_length=length)
        for length in (256, 512, 1024, 2048)
    },
    "domain": {name: Variant(calibration=name) for name in DOMAINS},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--ablations", default=",".join(ABLATIONS))
    parser.add_argument(
        "--eval", action="append", metavar="NAME=FILE", help="a text to evaluate on; may be repeated"
    )
    parser.add_argument("--kept", default="0.5,0.25")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="optimiser steps a layer of the learned methods")
    parser.add_argument("--epochs", type=int, help="passes over the blocks of the predictor")
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="of the model, e.g. bfloat16; by default its own, float32 on a CPU")
    parser.add_argument("--out", type=Path, help="JSON; by default benchmarks/results/ablation-MODEL.json")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    texts = named_files(given.eval) if given.eval else TEXTS
    need_shared(given.model, BOOKS, WIKITEXT, *texts.values())
    bench = Bench.load(given.model, given.device, given.dtype)
    # Positions and blocks to evaluate on are the same for all variants.
    length = Variant().sequence_length
    evaluation = {name: bench.evaluation(path, given.eval_samples, length) for name, path in texts.items()}
    results = Results.open(
        given.out or RESULTS / f"ablation-{bench.name}.json",
        {
            "model": bench.name,
            "dtype": str(bench.model.dtype).removeprefix("torch."),
            "steps": given.steps,
            "epochs": given.epochs,
            "texts": {name: {"blocks": len(b), "digest": b.digest} for name, b in evaluation.items()},
        },
    )
    run = Run(
        bench,
        results,
        FitSettings("stiefel", steps=given.steps, epochs=given.epochs),
        evaluation,
        shares(given.kept),
    )
    variants = dict.fromkeys(v for name in given.ablations.split(",") for v in ABLATIONS[name].values())
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for seed in seeds:
        # Variants that share a fit stand together, so that it is kept.
        for variant in sorted(variants, key=lambda v: (repr(replace(v, side=None)), repr(v))):
            if seed == seeds[0] or default_steps(MethodChoice.parse(variant.method).method):
                run.measure(variant, seed)


class Run:
    """What all measurements of one call share, and the last fit."""

    def __init__(
        self,
        bench: Bench,
        results: Results,
        settings: FitSettings,
        evaluation: dict[str, Blocks],
        kept: list[float],
    ) -> None:
        self.bench, self.results, self.settings = bench, results, settings
        self.evaluation, self.kept = evaluation, kept
        self._fit: tuple[Any, tuple[ErrorProfile, float]] | None = None

    def measure(self, variant: Variant, seed: int) -> None:
        todo = [
            (share, text)
            for share in self.kept
            for text in self.evaluation
            if not self.results.has(**variant.labels(), seed=seed, kept_asked=share, text=text)
        ]
        if not todo:
            return
        choice = MethodChoice.parse(variant.method)
        profile, seconds = self.fit(variant, choice, seed)
        for share, text in todo:
            plan = plan_of(profile, share, variant.side)
            row = measure_plan(
                self.bench.model, profile, plan, self.evaluation[text], choice, seconds=seconds, text=text
            )
            self.results.add(row, **variant.labels())

    def fit(self, variant: Variant, choice: MethodChoice, seed: int) -> tuple[ErrorProfile, float]:
        wanted = replace(variant, side=None), seed
        if self._fit is None or self._fit[0] != wanted:
            settings = replace(
                self.settings,
                num_samples=variant.num_samples,
                sequence_length=variant.sequence_length,
                propagate=variant.propagate,
                seed=seed,
            )
            # Text that the model writes is the same for all seeds, as the files are.
            blocks = self.bench.calibration(DOMAINS[variant.calibration], replace(settings, seed=0))
            self._fit = wanted, self.bench.profile(blocks, choice, settings, None)
        return self._fit[1]


def plan_of(profile: ErrorProfile, share: float, side: Side | None) -> Plan:
    """The knapsack's plan, or the same share of the width in every layer on one side or both."""
    budget = Budget("kept", share)
    if side is None:
        return allocate(profile, budget)
    ranks = [
        (
            max(1, round(share * layer.key.width)) if side != "value" else layer.key.width,
            max(1, round(share * layer.value.width)) if side != "key" else layer.value.width,
        )
        for layer in profile.layers
    ]
    return plan_ranks(profile, budget, "uniform", ranks)


if __name__ == "__main__":
    main()
