"""The child process of a worker: one step of a job, and the only part of the service that imports torch.

It reads one JSON request from standard input and writes JSON lines to standard output: `progress`, `file` (ready to be
committed), `usage`, then `result` or `error`. It knows nothing of databases, leases or object stores.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from huggingface_hub import constants as hub_constants

from app.infra import failpoints
from orthokv.checkpoint.read import read_checkpoint
from orthokv.checkpoint.write import record_measurements, write_checkpoint
from orthokv.files.folders import is_storage_failure
from orthokv.fit.refine import can_refine
from orthokv.measure.checkpoint import evaluate_checkpoint
from orthokv.models.loading import load, read_geometry
from orthokv.models.source import ModelSource, resolve_model
from orthokv.models.states import spilled_to
from orthokv.models.streaming import stored_tensors
from orthokv.pipeline import build_profile, fit_layers, make_plan, polish_plan, prepare_blocks
from orthokv.planning.profile import ErrorProfile, LayerProfile
from orthokv.show.plots import plot_profile
from orthokv.spec.check import check
from orthokv.spec.errors import BudgetUnreachable, OrthoKVError
from orthokv.spec.names import CONFIG
from orthokv.spec.progress import Step
from orthokv.spec.steps import polish_steps
from orthokv.text.blocks import Blocks
from orthokv.text.source import Format, TextMixture, TextSource
from workers.protocol import Error, File, Message, Progress, Request, Result, Usage

MEDIA_TYPES = {
    ".json": "application/json",
    ".safetensors": "application/octet-stream",
    ".png": "image/png",
    ".md": "text/markdown",
}


class Wire:
    """The protocol's writing side. One lock, because a watchdog may report while a step runs."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        with self._lock:
            self.stream.write(message.model_dump_json() + "\n")
            self.stream.flush()

    def progress(self, step: Step) -> None:
        self.send(Progress(phase=step.phase, done=step.done, total=step.total, unit=step.unit))

    def file(
        self, path: Path, *, name: str | None = None, layer: int | None = None, **metrics: float
    ) -> None:
        media_type = MEDIA_TYPES.get(path.suffix, "text/plain")
        self.send(
            File(name=name or path.name, path=str(path), media_type=media_type, layer=layer, metrics=metrics)
        )

    def usage(self) -> None:
        """The most memory held so far: of this process, and of its GPUs with what torch keeps in reserve."""
        unit = 1 if sys.platform == "darwin" else 1024
        gpu = None
        if torch.cuda.is_initialized():
            gpu = sum(torch.cuda.max_memory_reserved(index) for index in range(torch.cuda.device_count()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.send(Usage(peak_bytes=peak, peak_gpu_bytes=gpu))

    def result(self, data: dict[str, Any]) -> None:
        self.usage()
        self.send(Result(data=data))

    def error(self, code: str, message: str, *, retryable: bool = False, best: float | None = None) -> None:
        self.usage()
        self.send(Error(code=code, message=message, retryable=retryable, best=best))


class Job:
    """One request, with what several steps need."""

    def __init__(self, request: Request, wire: Wire) -> None:
        self.request, self.wire = request, wire
        self.settings, self.target, self.device = request.settings, request.target, request.device
        self.workdir = Path(request.workdir)
        self.inputs = {name: Path(path) for name, path in request.inputs.items()}

    def source(self) -> ModelSource:
        """The checked model on disk. It is the only thing that a step fetches: from here on the hub is out of reach."""
        model = self.request.model
        source = resolve_model(
            model.id,
            revision=model.revision,
            max_weight_bytes=model.max_weight_bytes,
            folders=model.id.startswith("/"),
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        hub_constants.HF_HUB_OFFLINE = True  # the client has read the variable when it was imported
        return source

    def text(self) -> TextSource | TextMixture:
        parts = tuple(
            TextSource(part.source, format=cast("Format | None", part.format), field=part.field)
            for part in self.request.dataset
        )
        return parts[0] if len(parts) == 1 else TextMixture(parts)

    def shown(self) -> str:
        """The texts by the names of their owner, for checkpoints and cards."""
        return " + ".join(part.shown or part.source for part in self.request.dataset)

    def blocks(self) -> Blocks:
        return Blocks.load(self.inputs["blocks.safetensors"])

    def held_out(self) -> Blocks:
        return self.blocks().split(self.settings.holdout)[1]

    def folder(self, name: str, *files: str) -> Path:
        """Inputs of this step laid out as a folder."""
        folder = self.workdir / name
        for file in files or tuple(n for n in self.inputs if n != "blocks.safetensors"):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.inputs[file], target)
        return folder


def resolve(job: Job) -> dict[str, Any]:
    """Is the model there, safe, supported and able to serve the key mode? Its weights are read only for the digest."""
    source = job.source()
    geometry = read_geometry(source)
    check(geometry, job.settings, job.target)
    model = {
        "id": source.id,
        "revision": source.revision,
        "digest": source.digest,
        "parameters": sum(math.prod(tensor.shape) for tensor in stored_tensors(source).values()),
    }
    return {"model": model, "geometry": geometry.to_dict()}


def calibrate(job: Job) -> dict[str, Any]:
    source, text = job.source(), job.text()
    parts = text.parts if isinstance(text, TextMixture) else (text,)
    written = any(part.resolved_format() == "self" for part in parts)
    model = load(source, job.device) if written else None
    blocks = prepare_blocks(source, text, job.settings, model, job.wire.progress)
    if any(part.shown for part in job.request.dataset):
        blocks = replace(blocks, source=job.shown())
    path = job.workdir / "blocks.safetensors"
    blocks.save(path)
    job.wire.file(path)
    samples, length = blocks.tokens.shape
    dataset = {
        "digest": blocks.digest,
        "num_samples": samples,
        "sequence_length": length,
        "tokens": samples * length,
    }
    return {"dataset": dataset}


def fit(job: Job) -> dict[str, Any]:
    # Once: resolving a source reads every weight for its digest.
    source, blocks = job.source(), job.blocks()
    model, geometry = load(source, job.device), read_geometry(source)
    # What later steps would refuse is refused before the first layer.
    can_refine(model, refine_steps=job.settings.refine_steps, polish_steps=job.target.polish_steps)
    for layer in fit_layers(model, blocks, job.settings, job.request.layers, job.wire.progress):
        path = job.workdir / f"layer-{layer.index:03d}.safetensors"
        layer.save(path, geometry)
        half = len(layer.ranks_key) // 2, len(layer.ranks_value) // 2
        job.wire.file(
            path, layer=layer.index, error=float(layer.error[half]), cosine=float(layer.cosine[half])
        )
    return {"layers": job.request.layers}


def profile(job: Job) -> dict[str, Any]:
    source = job.source()
    names = sorted(name for name in job.inputs if name.startswith("layer-"))
    layers = [LayerProfile.load(job.inputs[name]) for name in names]
    model = load(source, job.device)
    built = build_profile(model, source, job.blocks(), layers, job.settings, job.wire.progress)
    built.save(job.workdir)
    plot_profile(built, job.workdir / "profile.png")
    for name in ("profile.json", "profile.safetensors", "profile.png"):
        job.wire.file(job.workdir / name)
    summary = {
        "layers": len(built.layers),
        "key_mode": built.key_mode,
        "sharing": built.sharing,
        "method": built.method,
        "dataset": built.dataset,
        "sensitivity": [layer.sensitivity for layer in built.layers],
        "warnings": built.warnings,
    }
    return {"summary": summary}


def package(job: Job) -> dict[str, Any]:
    found = ErrorProfile.load(job.folder("profile", "profile.json", "profile.safetensors"))
    target = job.target
    # The model is for budgets of perplexity and to polish, its files are for full checkpoints.
    steps = polish_steps(found.method["refine_steps"], target.budget, target.polish_steps)
    needed = target.budget.metric == "perplexity_increase" or steps > 0
    source = job.source() if needed or target.form == "full" else None
    model = load(source, job.device) if needed and source is not None else None
    blocks = job.blocks()
    _, held_out = blocks.split(job.settings.holdout)
    plan, reached = make_plan(found, target, model=model, held_out=held_out, report=job.wire.progress)
    polished = found
    if model is not None:
        polished, reached = polish_plan(
            model, found, plan, reached, blocks, target.polish_steps, job.wire.progress
        )
    out = job.workdir / "checkpoint"
    write_checkpoint(found, plan, out, form=target.form, base=source, polished=polished)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        job.wire.file(path, name=path.relative_to(out).as_posix())
    taken = polished.method.get("polish_steps", 0)
    said = {"polish_steps": taken, "reached": None if reached is None else asdict(reached)}
    return {"plan": {**plan.to_dict(), **said}}


def evaluate(job: Job) -> dict[str, Any]:
    folder = job.folder("checkpoint")
    model = load(job.source(), job.device)
    checkpoint = read_checkpoint(folder)
    measured = evaluate_checkpoint(model, checkpoint, job.held_out(), report=job.wire.progress)
    record_measurements(folder, measured)
    for name in (CONFIG, "README.md", "SHA256SUMS"):
        job.wire.file(folder / name)
    return {"measured": measured}


STEPS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "resolve": resolve,
    "calibrate": calibrate,
    "fit": fit,
    "profile": profile,
    "package": package,
    "evaluate": evaluate,
}


def said(error: Exception, request: Request) -> str:
    """What an error says, with the names of its owner for the files of this step's folder."""
    message = str(error)
    for part in request.dataset:
        if part.shown is not None:
            message = message.replace(part.source, part.shown)
    return message


def run(request: Request, wire: Wire) -> int:
    """One step; returns the exit code."""
    try:
        job = Job(request, wire)
        with spilled_to(job.workdir if request.spill else None):
            result = STEPS[request.step](job)
        failpoints.hit(f"child.{request.step}")
        wire.result(result)
        return 0
    except BudgetUnreachable as error:
        wire.error(error.code, str(error), best=error.best)
    except OrthoKVError as error:
        wire.error(error.code, said(error, request))
    except (torch.OutOfMemoryError, MemoryError) as error:
        wire.error("out_of_memory", f"not enough memory: {error}", retryable=True)
    except Exception as error:
        if not is_storage_failure(error):
            raise
        # A file beyond the worker's limit is too large the next time, too.
        again = getattr(error, "errno", None) != errno.EFBIG and f"os error {errno.EFBIG}" not in str(error)
        wire.error("storage_error", f"cannot write the work folder: {error}", retryable=again)
    return 1


def main() -> int:
    os.umask(0o077)  # a step's files are its user's alone, whoever starts it
    # Libraries may print: only the protocol may reach standard output.
    wire, sys.stdout = Wire(sys.stdout), sys.stderr
    failpoints.arm_from_environment()
    return run(Request.model_validate_json(sys.stdin.buffer.read()), wire)


if __name__ == "__main__":
    sys.exit(main())
