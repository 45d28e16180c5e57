"""`make demo`: the main job, as a user would run it, on the small real model in this folder.

It writes a dataset, starts the service on a free port with a data folder of its own, uploads the dataset, posts a job, follows
it, downloads profile and checkpoint, asks for a second budget without fitting again, generates from the checkpoint in a fresh
process, and measures the baselines beside it. Everything it starts, it stops.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from orthokv.checkpoint.read import read_checkpoint
from orthokv.cli.output import TABLE_COLUMNS
from orthokv.compare import MethodChoice, compare_methods
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.models.loading import load
from orthokv.models.source import load_tokenizer, resolve_model
from orthokv.pipeline import prepare_blocks
from orthokv.planning.allocate import allocate
from orthokv.planning.profile import ErrorProfile
from orthokv.show.plots import plot_comparison, plot_plan, plot_profile
from orthokv.show.results import ComparisonRow
from orthokv.show.tables import comparison_table
from orthokv.spec.budget import Budget
from orthokv.spec.settings import FitSettings
from orthokv.text.source import TextSource
from orthokv.text.written import self_text
from orthokv_client import OrthoKV

HERE = Path(__file__).parent
ROOT = HERE.parent
MODEL = HERE / "demo-llama-3m"
OUT = ROOT / "out" / "demo"
ORTHOKV = [sys.executable, "-m", "orthokv.cli"]

# Documents are read again with the model's tokenizer, which may need a few tokens less: write some to spare.
DOCUMENTS, SAMPLES, LENGTH = 60, 48, 256
BUDGET, SECOND_BUDGET = 0.5, 0.25
EVALUATION_SAMPLES = 32
PREDICTOR_EPOCHS = 6
PROMPT = "The house stood at the end of a long road, and"

console = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)


def say(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def orthokv(*arguments: str) -> None:
    """Run one command of the product, shown as a user would type it; its output is the user's to see."""
    shown = [
        "orthokv",
        *(str(Path(a).relative_to(ROOT)) if a.startswith(str(ROOT)) else a for a in arguments),
    ]
    console.print(f"$ {shlex.join(shown)}", style="dim", highlight=False, soft_wrap=True)
    done = subprocess.run([*ORTHOKV, *arguments], check=False)
    if done.returncode:
        sys.exit(f"the demo stops: 'orthokv {arguments[0]}' ended with code {done.returncode}")


@contextmanager
def service(data: Path) -> Iterator[str]:
    """The embedded service on a free port; yields its URL and ends it afterwards."""
    data.mkdir(parents=True)
    with (data / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*ORTHOKV, "serve", "--data", str(data), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "listening on " in line:
                    yield line.rsplit(" ", 1)[1].strip()
                    break
            else:
                sys.exit(f"the service did not start; see {data / 'server.log'}")
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def write_dataset(path: Path) -> None:
    """Text that the model writes itself, as a user's JSONL file: no text of other people has to be shipped."""
    source = resolve_model(str(MODEL))
    tokenizer = load_tokenizer(source)
    written = self_text(
        load(source, "cpu"), num_samples=DOCUMENTS, sequence_length=LENGTH, seed=7, batch_size=DOCUMENTS
    )
    with path.open("w", encoding="utf-8") as file:
        for tokens in written.tokens:
            file.write(json.dumps({"text": tokenizer.decode(tokens[1:])}) + "\n")


def main() -> None:
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    say("1. A calibration dataset: the model writes its own")
    dataset = OUT / "dataset.jsonl"
    write_dataset(dataset)
    console.print(f"{dataset.relative_to(ROOT)}: {DOCUMENTS} documents", highlight=False)

    say("2. Start the service, post a job, follow it")
    with service(OUT / "service") as url:
        console.print(f"service at {url}", highlight=False)
        settings = ["--num-samples", str(SAMPLES), "--sequence-length", str(LENGTH), "--url", url]
        orthokv(
            "jobs",
            "submit",
            "--model",
            str(MODEL),
            "--dataset",
            str(dataset),
            "--kept",
            str(BUDGET),
            "--wait",
            *settings,
        )
        with OrthoKV(url) as client:
            job = next(client.jobs.list())
            say("3. Download the profile and the checkpoint")
            half = OUT / "checkpoint-50"
            orthokv(
                "jobs",
                "download",
                job.id,
                "--out",
                str(half),
                "--profile",
                str(OUT / "profile"),
                "--url",
                url,
            )

            say("4. A second budget from the stored profile: no fit, only a polish at its ranks")
            began = time.monotonic()
            assert job.result is not None
            assert job.result.profile_id is not None
            body = {"budget": {"metric": "kept", "value": SECOND_BUDGET}}
            second = client.profiles.create_checkpoint(job.result.profile_id, body)
            orthokv("jobs", "watch", second.id, "--url", url)
            quarter = OUT / "checkpoint-25"
            orthokv("jobs", "download", second.id, "--out", str(quarter), "--url", url)
            console.print(f"ready after {time.monotonic() - began:.1f} s", highlight=False)

    say("5. Load the checkpoint in a fresh process and generate")
    orthokv("generate", str(half), "--prompt", PROMPT, "--max-new-tokens", "48")
    say("   The uncompressed model on the same prompt")
    orthokv("generate", str(half), "--prompt", PROMPT, "--max-new-tokens", "48", "--uncompressed")

    say("6. Measure it beside the baselines, on text the model writes itself (another seed)")
    rows = measure({BUDGET: half, SECOND_BUDGET: quarter}, dataset)
    console.print(comparison_table(rows, rows[0].perplexity_dense))
    console.print(
        f"The predictor is StiefAttention's, here after {PREDICTOR_EPOCHS} of its up to 50 epochs. "
        "With all of them, on a larger model: docs/results.md.",
        highlight=False,
    )
    profile = ErrorProfile.load(OUT / "profile")
    plots = [
        plot_profile(profile, OUT / "profile.png"),
        plot_plan(allocate(profile, Budget("kept", BUDGET)), profile, OUT / "ranks.png"),
        plot_comparison(rows, OUT / "comparison.png"),
    ]
    say("Plots")
    for plot in plots:
        console.print(str(plot.relative_to(ROOT)), highlight=False)
    console.print(
        f"\nDone in {time.monotonic() - start:.0f} s; everything is in {OUT.relative_to(ROOT)}/",
        highlight=False,
    )


def measure(checkpoints: dict[float, Path], dataset: Path) -> list[ComparisonRow]:
    """EigenAttention, StiefAttention as in its paper, and the downloaded checkpoints, on the same blocks and at equal bytes."""
    source = resolve_model(str(MODEL))
    model = load(source, "cpu")
    # The paper's recipe has up to 50 epochs; a few show where it is heading without the wait.
    settings = FitSettings("stiefel", num_samples=SAMPLES, sequence_length=LENGTH, epochs=PREDICTOR_EPOCHS)
    blocks = prepare_blocks(source, TextSource(str(dataset)), settings, model)
    evaluation = self_text(
        model, num_samples=EVALUATION_SAMPLES, sequence_length=LENGTH, seed=1, batch_size=EVALUATION_SAMPLES
    )
    choices = [MethodChoice.parse(text) for text in ("eigen:tied", "stiefel:tied:predictor")]
    rows = compare_methods(model, source, blocks, evaluation, list(checkpoints), choices, settings)
    for share, folder in checkpoints.items():
        checkpoint = read_checkpoint(folder)
        measured = evaluate_checkpoint(model, checkpoint, evaluation)
        errors = measured["layer_error"]
        rows.append(
            ComparisonRow(
                method="oblique (default)",
                sharing=checkpoint.sharing,
                key_mode=checkpoint.key_mode,
                kept_asked=share,
                kept=measured["kept"],
                cache_bytes_per_token=round(measured["cache_bytes_per_token"]),
                perplexity=measured["perplexity"],
                perplexity_dense=measured["perplexity_dense"],
                kl=measured["kl"],
                layer_error=sum(errors) / len(errors),
                seconds=None,
            )
        )
    return rows


if __name__ == "__main__":
    main()
