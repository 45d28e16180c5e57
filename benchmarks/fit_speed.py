"""How long a full error-rank profile of a large model takes on one GPU, phase by phase, against the card's own ceiling.

    python -m benchmarks.fit_speed --shape 8b --out results.json
    python -m benchmarks.fit_speed --shape tiny --samples 8 --length 128 --device cpu      # does it run?

The model has random weights, made on the device: times and memory are those of a real model of the shape, quality means
nothing. The functions timed are the product's own (`orthokv.pipeline.fit_layers` and `build_profile`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orthokv import pipeline
from orthokv.fit.methods import METHODS
from orthokv.fit.refine import CHECKS
from orthokv.models.source import resolve_device
from orthokv.show.progress import PlainReporter
from orthokv.spec.rankgrid import CANDIDATE_SHARES
from orthokv.spec.settings import FitSettings
from orthokv.text.blocks import Blocks

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            bos_token_id=1,  # a refinement is also watched on text that the model writes
            eos_token_id=None,
            pad_token_id=None,
        )

    def layer_flop(self, tokens: int) -> tuple[float, float]:
        """Floating-point operations of one decoder layer on one block: linear maps, and causal attention."""
        head_dim = self.hidden // self.heads
        maps = self.hidden * (2 * self.hidden + 2 * self.kv_heads * head_dim + 3 * self.intermediate)
        return 2.0 * tokens * maps, 2.0 * tokens * tokens * self.hidden


SHAPES = {
    "tiny": Shape(layers=3, hidden=64, heads=4, kv_heads=2, intermediate=128, vocabulary=256),
    "1b": Shape(layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256),
    "8b": Shape(layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256),
}


class Stopwatch:
    """Seconds by phase, of functions as they are called by the product, and what each returned last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.returned: dict[str, Any] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def watching(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            self.returned[phase] = inner(*args, **kwargs)
            self.seconds[phase] += self.now() - start
            return self.returned[phase]

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, inner)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, layers: int) -> LlamaForCausalLM:
    config = shape.config()
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for layer in model.model.layers:  # keys and values whose energy falls off, as it does in trained models
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            rows = projection.weight.shape[0]
            fall = torch.linspace(0, -4, rows, device=device).exp()
            mix = torch.linalg.qr(torch.randn(rows, rows, device=device))[0]
            projection.weight.data = ((mix * fall) @ projection.weight.float()).to(dtype) * 4
    return cast(LlamaForCausalLM, model.eval().requires_grad_(False))


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product in the model's dtype: what the card reaches in practice."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    watch, best = Stopwatch(device), 0.0
    for _ in range(8):
        start = watch.now()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * size**3 / (watch.now() - start))
    return best


def measure(model: LlamaForCausalLM, shape: Shape, settings: FitSettings, *, whole: bool) -> dict[str, Any]:
    """Fit every layer of `model`; with `whole` also sensitivities, the refinement and the errors after it."""
    device = model.device
    watch, report = Stopwatch(device), PlainReporter()
    generator = torch.Generator().manual_seed(0)
    size = (settings.num_samples, settings.sequence_length)
    blocks = Blocks.of(torch.randint(shape.vocabulary, size, generator=generator), "random tokens")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = watch.now()
    method = METHODS[settings.method]
    with (
        watch.watching(pipeline, "view_layer", "moments"),
        watch.watching(method, "fit", "learning"),
        watch.watching(pipeline, "measure_layer", "error surface"),
    ):
        layers = list(pipeline.fit_layers(model, blocks, settings, report=report))
    fitted = watch.now()
    if whole:
        source: Any = _NoSource()
        with (
            watch.watching(pipeline, "weight_fingerprints", "weight fingerprints"),
            watch.watching(pipeline, "sensitivities", "sensitivities"),
            watch.watching(pipeline, "watched_texts", "text the model writes"),
            watch.watching(pipeline, "refine", "refinement"),
            watch.watching(pipeline, "measure_errors", "error surface after the refinement"),
        ):
            pipeline.build_profile(model, source, blocks, layers, settings, report)
    end = watch.now()
    refined = 0
    if "refinement" in watch.returned and settings.refinement_steps:
        refined = (len(watch.returned["refinement"][1]) - 1) * settings.refinement_steps // CHECKS
    counts = _flop(shape, settings, len(model.model.layers), refined)
    phases = {
        name: {
            "seconds": seconds,
            "flop": counts.get(name),
            "flop_per_second": _rate(counts.get(name), seconds),
        }
        for name, seconds in watch.seconds.items()
    }
    return {
        "layers": len(layers),
        "num_samples": settings.num_samples,
        "sequence_length": settings.sequence_length,
        "seconds": end - start,
        "seconds_fitting": fitted - start,
        # Random weights have nothing to refine: the watch on other text ends the stage before all steps are done.
        "refinement_steps": {
            "done": refined,
            "asked": settings.refinement_steps,
        },
        "phases": phases,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None,
    }


class _NoSource:
    """Stands for the files that a random model does not have; only its name is written into the profile."""

    id, revision, digest, folder = "random", "none", "none", Path()


def _rate(flop: float | None, seconds: float) -> float | None:
    return None if flop is None or seconds == 0 else flop / seconds


def _flop(shape: Shape, settings: FitSettings, layers: int, refined: int) -> dict[str, float]:
    """What each phase asks of the layers' own arithmetic, a lower bound: bases, inverses and logits are not counted.

    A backward pass needs no gradients of weights: as much as a forward for linear maps, 2.5 times as much for attention.
    """
    maps, attention = shape.layer_flop(settings.sequence_length)
    forward, both = maps + attention, 2 * maps + 3.5 * attention
    fitting = settings.num_samples - settings.holdout
    method = settings.method_settings
    steps = getattr(method, "steps", 0)
    surface = (len(CANDIDATE_SHARES) ** 2) * settings.profile_samples * forward * layers
    found = {
        "moments": fitting * forward * layers,
        "learning": steps * both * layers,
        "error surface": surface,
    }
    if refined:
        # Each block goes through the uncompressed model once.
        found["refinement"] = (refined * both + min(refined, fitting) * forward) * layers
        found["error surface after the refinement"] = surface
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--method", choices=sorted(METHODS), default="oblique")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--refine-steps", type=int)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to see how time grows")
    parser.add_argument(
        "--growth", action="store_true", help="also 2 layers at other numbers of samples and lengths"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    shape = SHAPES[arguments.shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = FitSettings(
        arguments.method,
        num_samples=arguments.samples,
        sequence_length=arguments.length,
        steps=arguments.steps,
        refine_steps=arguments.refine_steps,
        batch_size=arguments.batch_size,
    )
    model = random_model(shape, device, dtype, arguments.layers or shape.layers)
    found: dict[str, Any] = {
        "shape": arguments.shape,
        "method": arguments.method,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "ceiling_flop_per_second": ceiling(device, dtype),
        "runs": [],
    }
    warm_up = FitSettings(arguments.method, num_samples=2, sequence_length=64, steps=2, refine_steps=0)
    measure(random_model(shape, device, dtype, 1), shape, warm_up, whole=False)
    _add(found, measure(model, shape, settings, whole=True), arguments.out)
    if arguments.growth:
        small = random_model(shape, device, dtype, 2)
        for samples, length in ((32, 2048), (64, 2048), (128, 2048), (128, 1024), (128, 512)):
            grown = FitSettings(
                arguments.method, num_samples=samples, sequence_length=length, batch_size=arguments.batch_size
            )
            _add(found, measure(small, shape, grown, whole=False), arguments.out)


def _add(found: dict[str, Any], run: dict[str, Any], out: Path | None) -> None:
    """Print a run and keep all so far: a run that breaks off loses nothing that was measured."""
    found["runs"].append(run)
    print(
        f"{run['layers']} layers, {run['num_samples']} x {run['sequence_length']} tokens: {run['seconds']:.1f} s"
        + (f", peak {run['peak_memory_gib']:.1f} GiB" if run["peak_memory_gib"] is not None else ""),
        flush=True,
    )
    for name, phase in run["phases"].items():
        rate = phase["flop_per_second"]
        share = f"  {rate / found['ceiling_flop_per_second']:6.1%} of the ceiling" if rate else ""
        print(f"  {name:36} {phase['seconds']:8.2f} s{share}", flush=True)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
