"""Every method at every size on several texts: `python -m benchmarks.quality --help`.

One row a method, key mode, seed, rank rule, share of bytes and text. The file is written after each row and a broken run
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from benchmarks.bench import (
    CALIBRATION,
    MODEL,
    RESULTS,
    TEXTS,
    Bench,
    Results,
    named_files,
    need_shared,
    rows_of,
    shares,
)
from benchmarks.merge import merge
from orthokv.compare import MethodChoice, measure_plan, polish_profile
from orthokv.planning.allocate import allocate
from orthokv.show.plots import plot_comparison
from orthokv.show.results import ComparisonRow, summarise
from orthokv.show.tables import details_markdown, ratios_markdown
from orthokv.spec.budget import Budget
from orthokv.spec.errors import BudgetUnreachable, UnsupportedModel
from orthokv.spec.methods import default_steps
from orthokv.spec.settings import FitSettings
from orthokv.spec.vocabulary import KEY_MODES, Allocation, KeyMode
from orthokv.text.blocks import Blocks

KEPT = "0.75,0.5,0.375,0.25,0.125"
# Under their published names: see docs/results.md. Quick ones first.
METHOD_LIST = (
    "eigen:tied",
    "eigen:head:statistics=kq",
    "eigen:head",
    "weighted:head",
    "palu:joint",
    "palu:joint:whitened=false",
    "eigen:joint",
    "weighted:joint",
    "stiefel:joint",
    "oblique:joint",
    "oblique:joint:polish_steps=0",
    "stiefel:tied",
    "stiefel:head",
    "stiefel:tied:predictor",
)
# Besides the knapsack, for keys before RoPE: each paper's own rule, and for one method every rule that plans for bytes.
RULES: dict[str, tuple[Allocation, ...]] = {
    "eigen:tied": ("threshold",),
    "stiefel:tied:predictor": ("pareto",),
    "stiefel:joint": ("greedy", "uniform", "pareto"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument(
        "--calibration", default=CALIBRATION[0], help="files, or self, separated by commas: mixed"
    )
    parser.add_argument(
        "--mixture",
        action="store_true",
        help="calibrate on books, WikiText-2 and text of the model's own, mixed",
    )
    parser.add_argument(
        "--eval", action="append", metavar="NAME=FILE", help="a text to evaluate on; may be repeated"
    )
    parser.add_argument("--methods", default=",".join(METHOD_LIST))
    parser.add_argument("--key-modes", default=",".join(KEY_MODES))
    parser.add_argument("--kept", default=KEPT)
    parser.add_argument("--seeds", default="0,1,2", help="of learned methods; the others have one fit")
    parser.add_argument(
        "--allocations", help="rules for all methods, instead of the knapsack and each paper's own"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps a layer of the learned methods")
    parser.add_argument("--epochs", type=int, help="passes over the blocks of the predictor")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--profile-samples", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="of the model, e.g. bfloat16; by default its own, float32 on a CPU")
    parser.add_argument("--out", type=Path, help="JSON; by default benchmarks/results/quality-MODEL.json")
    parser.add_argument(
        "--profiles", type=Path, help="a folder that keeps every fit, so that a broken run need not repeat it"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="fits at a time, each in a process of its own: several fill a large GPU that one small model does not",
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    texts = named_files(given.eval) if given.eval else TEXTS
    parts = list(CALIBRATION) if given.mixture else given.calibration.split(",")
    need_shared(given.model, *parts, *texts.values())
    choices = {text: MethodChoice.parse(text) for text in given.methods.split(",")}
    settings = FitSettings(
        method="stiefel",  # the one that has all hyper-parameters; each choice takes those that it has
        num_samples=given.num_samples,
        sequence_length=given.sequence_length,
        profile_samples=given.profile_samples,
        steps=given.steps,
        epochs=given.epochs,
    )
    bench = Bench.load(given.model, given.device, given.dtype)
    out: Path = given.out or RESULTS / f"quality-{bench.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    blocks = bench.calibration(parts, settings, keep=calibration_of(out))
    evaluation = {
        name: bench.evaluation(path, given.eval_samples, given.sequence_length)
        for name, path in texts.items()
    }
    results = Results.open(
        out,
        {
            "model": bench.name,
            "dtype": str(bench.model.dtype).removeprefix("torch."),
            "calibration": {
                "source": " + ".join(Path(part).name for part in parts),
                "digest": blocks.digest,
                "num_samples": len(blocks),
                "sequence_length": given.sequence_length,
            },
            "steps": given.steps,
            "epochs": given.epochs,
            "profile_samples": given.profile_samples,
            "texts": {name: {"blocks": len(b), "digest": b.digest} for name, b in evaluation.items()},
        },
    )
    fits = [
        (text, mode, seed)
        for text, choice in choices.items()
        for mode in given.key_modes.split(",")
        for seed in (given.seeds.split(",") if default_steps(choice.method) else "0")
    ]
    if given.processes > 1:
        show(measure_apart(results, fits, given.processes))
        return
    run = Run(bench, results, settings, blocks, evaluation, shares(given.kept), given.profiles)
    for text, mode, seed in fits:
        rules: list[str] = given.allocations.split(",") if given.allocations else ["knapsack"]
        if not given.allocations and mode == "pre":
            rules += RULES.get(text, ())
        run.measure(choices[text], cast(KeyMode, mode), int(seed), cast("list[Allocation]", rules))
    show(results)


def measure_apart(results: Results, fits: list[tuple[str, str, str]], processes: int) -> Results:
    """Every fit by this same command in a process of its own, so many at a time; then all their rows in one file.

    Ends the program where one of them fails; what the others measured stays, and the same command goes on from there.
    """
    out = results.path
    folder = out.with_suffix(".parts")
    folder.mkdir(exist_ok=True)

    def measure(fit: tuple[str, str, str]) -> Path:
        text, mode, seed = fit
        part = folder / f"{'-'.join(fit).replace(':', '-')}.json"
        shutil.copyfile(calibration_of(out), calibration_of(part))
        if out.is_file() and not part.is_file():
            shutil.copyfile(out, part)  # what is measured is not measured again
        command = [
            sys.executable,
            "-m",
            "benchmarks.quality",
            *sys.argv[1:],
            "--processes",
            "1",
            "--out",
            str(part),
        ]
        command += ["--methods", text, "--key-modes", mode, "--seeds", seed]
        with part.with_suffix(".log").open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        print(f"{text} {mode} seed {seed}: exit code {ended.returncode}", flush=True)
        if ended.returncode:
            raise subprocess.CalledProcessError(ended.returncode, command)
        return part

    with ThreadPoolExecutor(processes) as pool:
        # Slow ones are the last of the list: they begin first, so that none is left over at the end.
        begun = [pool.submit(measure, fit) for fit in reversed(fits)]
    failed = sum(future.exception() is not None for future in begun)
    if failed:
        sys.exit(
            f"{failed} of {len(fits)} fits failed: see the logs in {folder}, and run the same command again"
        )
    merged = merge(out, [future.result() for future in reversed(begun)])
    shutil.rmtree(folder)
    return merged


def calibration_of(out: Path) -> Path:
    """The calibration tokens beside a result file."""
    return out.with_suffix(".calibration.safetensors")


@dataclass
class Run:
    """What all measurements of one call share."""

    bench: Bench
    results: Results
    settings: FitSettings
    blocks: Blocks
    evaluation: dict[str, Blocks]
    kept: list[float]
    profiles: Path | None

    def measure(self, choice: MethodChoice, mode: KeyMode, seed: int, rules: list[Allocation]) -> None:
        """One fit, and all its rows that the file does not have yet."""
        fit = {"method": str(choice), "sharing": choice.sharing, "key_mode": mode}
        todo = [
            (rule, share, text)
            for rule in rules
            for share in self.kept
            for text in self.evaluation
            if not self.results.has(**fit, seed=seed, allocation=rule, kept_asked=share, text=text)
        ]
        if not todo:
            return
        name = f"{choice}-{choice.sharing}-{mode}-{seed}".replace(" ", "")
        folder = None if self.profiles is None else self.profiles / name
        settings = replace(self.settings, key_mode=mode, seed=seed)
        try:
            profile, seconds = self.bench.profile(self.blocks, choice, settings, folder)
        except UnsupportedModel as error:
            self.results.refuse(str(error), **fit)
            return
        for rule, share in dict.fromkeys((rule, share) for rule, share, _ in todo):
            try:
                plan = allocate(profile, Budget("kept", share), rule)
            except BudgetUnreachable as error:
                self.results.refuse(str(error), **fit, seed=seed, allocation=rule, kept_asked=share)
                continue
            model = self.bench.model
            polished, more = polish_profile(model, profile, plan, self.blocks, choice)
            for text in [text for *of, text in todo if of == [rule, share]]:
                blocks = self.evaluation[text]
                self.results.add(
                    measure_plan(model, polished, plan, blocks, choice, seconds=seconds + more, text=text)
                )


def show(results: Results) -> None:
    """Tables of every text on standard output, and a plot of the first beside the JSON."""
    every = rows_of(results.rows)
    for n, text in enumerate(results.header["texts"]):
        rows = [row for row in every if row.text == text]
        if not rows:
            continue
        print(f"\n{results.header['model']} on {text}: perplexity over that of the uncompressed model\n")
        print(ratios_markdown(rows))
        print(details_markdown(rows))
        if n == 0:
            plot_quality(rows, results.path.with_suffix(".png"))


def plot_quality(rows: list[ComparisonRow], path: Path) -> None:
    """One text, ranks by the knapsack, means over seeds; keys before RoPE where there are any, so that lines stay few."""
    modes = {row.key_mode for row in rows}
    mode = "pre" if "pre" in modes else "post"
    shown = [row for row in rows if row.allocation == "knapsack" and row.key_mode == mode]
    if shown:
        plot_comparison([summary.row for summary in summarise(shown)], path)


if __name__ == "__main__":
    main()
