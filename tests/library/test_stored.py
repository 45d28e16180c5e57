"""What files will take on disk, told before they are there, against the files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from orthokv.checkpoint.read import read_checkpoint
from orthokv.checkpoint.write import write_checkpoint
from orthokv.models.geometry import geometry_of
from orthokv.models.loading import load, read_geometry
from orthokv.models.source import ModelSource, resolve_model
from orthokv.pipeline import build_profile, fit_layers, make_plan, prepare_blocks
from orthokv.planning.profile import ErrorProfile
from orthokv.spec.budget import Budget
from orthokv.spec.methods import METHODS
from orthokv.spec.settings import FitSettings
from orthokv.spec.stored import Layout, checkpoint_tensors, layer_tensors, safetensors_bytes, stored_bytes
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import SHARING_CHOICES
from orthokv.text.blocks import Blocks
from orthokv.text.source import TextSource
from tests.support.tiny import tiny_config, tiny_folder, tiny_text
from workers.protocol import DatasetRef, File, ModelRef, Request, parse
from workers.runner import STEPS, Job, Wire

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
DEMO = Path(__file__).parents[2] / "demo" / "demo-llama-3m"
CLOSE = 0.02


def settings_of(method: str, sharing: Any = "joint", **changes: Any) -> FitSettings:
    learned = {"steps": 1} if "steps" in METHODS[method].__dataclass_fields__ else {}
    given = {"num_samples": 6, "sequence_length": 64, "refine_steps": 0, **learned, **changes}
    return FitSettings(method=method, sharing=sharing, **given)


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def layouts(path: Path) -> dict[str, Layout]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose bases outweigh what is said about them, with as many KV heads as every grouping needs."""
    return tiny_folder(tmp_path_factory.mktemp("wide"), "llama", **WIDE)


def blocks_of(source: ModelSource, settings: FitSettings, folder: Path) -> Blocks:
    text = folder / "text.txt"
    text.write_text(tiny_text(8000))
    return prepare_blocks(source, TextSource(str(text), format="text"), settings, None)


def write_all(source: ModelSource, settings: FitSettings, target: Target, folder: Path) -> ErrorProfile:
    """The folders that a job's files come from: fitted layers, their profile, a checkpoint."""
    model, geometry = load(source, "cpu"), read_geometry(source)
    blocks = blocks_of(source, settings, folder)
    for name in ("layers", "profile"):
        (folder / name).mkdir()
    fitted = list(fit_layers(model, blocks, settings))
    for layer in fitted:
        layer.save(folder / "layers" / f"{layer.index}.safetensors", geometry)
    profile = build_profile(model, source, blocks, fitted, settings)
    profile.save(folder / "profile")
    plan, _ = make_plan(profile, target)
    write_checkpoint(profile, plan, folder / "checkpoint")
    return profile


@pytest.mark.parametrize("sharing", SHARING_CHOICES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_form_takes_what_was_told(
    method: str, sharing: Any, wide: Path, tmp_path: Path
) -> None:
    settings, target = settings_of(method, sharing), Target(Budget("kept", 0.25))
    # Where it matters what is good: how a plan splits its bytes between keys and values, and which form `auto` takes.
    source = resolve_model(str(DEMO if sharing in ("tied", "auto") else wide))
    profile = write_all(source, settings, target, tmp_path)
    geometry = profile.geometry
    for layer in profile.layers:
        told = layer_tensors(geometry, method, layer.sharing, layer.index)
        assert layouts(tmp_path / "layers" / f"{layer.index}.safetensors") == told
    tensors = tmp_path / "checkpoint" / "orthokv.safetensors"
    ranks = read_checkpoint(tmp_path / "checkpoint").config["plan"]["ranks"]
    pairs = [(pair["key"], pair["value"]) for pair in ranks]
    assert layouts(tensors) == checkpoint_tensors(geometry, method, profile.layers[0].sharing, pairs)
    assert safetensors_bytes(layouts(tensors)) == tensors.stat().st_size

    told_bytes = stored_bytes(geometry, settings, target)
    for name in ("layers", "profile", "checkpoint"):
        assert getattr(told_bytes, name) == pytest.approx(sizes(tmp_path / name), rel=CLOSE), name


def test_auto_leaves_no_more_than_its_widest_form(wide: Path, tmp_path: Path) -> None:
    settings, target = settings_of("weighted", "auto"), Target(Budget("kept", 0.25))
    profile = write_all(resolve_model(str(wide)), settings, target, tmp_path)
    told = stored_bytes(profile.geometry, settings, target)
    for name in ("layers", "profile", "checkpoint"):
        assert sizes(tmp_path / name) < (1 + CLOSE) * getattr(told, name), name
    joint = stored_bytes(profile.geometry, settings_of("weighted", "joint"), target)
    assert told.total == pytest.approx(joint.total, rel=0.01)


def test_a_codec_and_a_budget_say_how_wide_bases_of_a_checkpoint_are() -> None:
    geometry, settings = geometry_of(tiny_config("llama", **WIDE)), settings_of("weighted")

    def checkpoint(*budget: Any) -> int:
        return stored_bytes(geometry, settings, Target(Budget(*budget))).checkpoint

    quarter, half, whole = (checkpoint("kept", share) for share in (0.25, 0.5, 1.0))
    assert whole - half == pytest.approx(2 * (half - quarter), rel=0.05)
    # Nobody knows what it will keep: the middle.
    assert checkpoint("layer_error", 0.1) == pytest.approx(half, rel=0.02)


def run_steps(model: Path, settings: FitSettings, target: Target, folder: Path) -> Iterator[tuple[str, int]]:
    """All steps of a job as a worker's child runs them: name and size of every file."""
    text = folder / "text.txt"
    text.write_text(tiny_text(8000))
    inputs: dict[str, str] = {}
    layers = list(range(read_geometry(resolve_model(str(model))).layers))
    for step, run in STEPS.items():
        work = folder / step
        work.mkdir()
        # As orders.load_order leaves out what a step does not read.
        unread = [name for name in inputs if name.startswith("layer-") or name.endswith(".png")]
        needed = {name: path for name, path in inputs.items() if step == "profile" or name not in unread}
        request = Request(
            step=step,
            job_id="job",
            workdir=str(work),
            model=ModelRef(id=str(model), revision=None),
            dataset=[DatasetRef(source=str(text), format="text", field="text")],
            settings=settings,
            target=target,
            layers=layers,
            inputs=needed,
            device="cpu",
            spill=False,
        )
        said = io.StringIO()
        run(Job(request, Wire(said)))
        for line in said.getvalue().splitlines():
            message = parse(line.encode())
            if isinstance(message, File):
                inputs[message.name] = message.path
                yield f"{step}/{message.name}", Path(message.path).stat().st_size


def test_a_job_leaves_as_many_bytes_as_was_told(tmp_path: Path) -> None:
    """Every file of every step: tokens, layers, profile, picture, checkpoint, and its descriptions once more."""
    settings = settings_of("weighted")
    target = Target(Budget("kept", 0.25), polish_steps=0)
    left = dict(run_steps(DEMO, settings, target, tmp_path))
    told = stored_bytes(read_geometry(resolve_model(str(DEMO))), settings, target)
    assert told.total == pytest.approx(sum(left.values()), rel=CLOSE)
    assert told.blocks == pytest.approx(left["calibrate/blocks.safetensors"], rel=CLOSE)
    said = sum(left[f"evaluate/{name}"] for name in ("orthokv.json", "README.md", "SHA256SUMS"))
    assert told.measured == pytest.approx(said, rel=0.1)
