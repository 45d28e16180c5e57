"""The last stage of a fit: what it may change, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from orthokv.bases.manifold import orthonormality_error
from orthokv.compare import MethodChoice
from orthokv.fit.refine import Refinement, _Teacher, refine
from orthokv.fit.task import view_layer
from orthokv.fit.walk import LayerWalk
from orthokv.measure.quality import quality
from orthokv.planning.allocate import allocate
from orthokv.planning.bases import planned_bases
from orthokv.planning.profile import ErrorProfile
from orthokv.runtime.seam import Seam
from orthokv.spec.budget import Budget
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.settings import FitSettings
from orthokv.text.blocks import Blocks
from orthokv.text.written import self_text
from tests.support.tiny import tiny_blocks, tiny_folder, tiny_model, tiny_profile

METHODS = ("eigen", "weighted")  # a point of the manifold, and an oblique pair


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ErrorProfile]:
    @cache
    def made(architecture: str = "llama", **settings: Any) -> ErrorProfile:
        return tiny_profile(tiny_folder(tmp_path_factory.mktemp("model"), architecture), **settings)

    return made


@cache
def written(architecture: str) -> Blocks:
    """Text of the model's own, the only text that a random model has something to say about."""
    return self_text(tiny_model(architecture), num_samples=8, sequence_length=32, seed=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("architecture", "sharing"), [("llama", "joint"), ("qwen2", "tied"), ("opt", "head")]
)
def test_refining_brings_the_predictions_closer_at_every_budget(
    architecture: str, sharing: str, method: str, profile: Callable[..., ErrorProfile]
) -> None:
    found, model, text = (
        profile(architecture, method=method, sharing=sharing),
        tiny_model(architecture),
        written(architecture),
    )
    refined, scores = refine(model, found, text, [text], Refinement(40, 0.05), seed=0)
    assert min(scores) < scores[0] - 0.05
    with Seam(model, found.key_mode) as seam:
        for kept in (0.6, 0.4, 0.25):
            plan = allocate(found, Budget("kept", kept))
            before, after = (quality(seam, planned_bases(model, p, plan), text).kl for p in (found, refined))
            assert after < before


@pytest.mark.parametrize("method", METHODS)
def test_refined_bases_stay_what_they_were(method: str, profile: Callable[..., ErrorProfile]) -> None:
    found = profile(method=method)
    refined, _ = refine(
        tiny_model("llama"), found, written("llama"), [written("llama")], Refinement(10, 0.05), seed=0
    )
    for before, after in zip(found.layers, refined.layers, strict=True):
        for old, new in ((before.key, after.key), (before.value, after.value)):
            assert not torch.equal(old.encoder, new.encoder)
            assert new.orthonormal == old.orthonormal
            if new.orthonormal:
                assert orthonormality_error(new.encoder) < 1e-5
            # Every prefix of the columns is a projector: decoding and encoding again changes nothing.
            dual = new.decoder.transpose(-1, -2) @ new.encoder
            assert torch.allclose(dual, torch.eye(new.rank).expand_as(dual), atol=1e-4)


def test_steps_that_lead_nowhere_return_the_start(profile: Callable[..., ErrorProfile]) -> None:
    found = profile(method="eigen")
    refined, scores = refine(
        tiny_model("llama"), found, tiny_blocks(4, 16), [written("llama")], Refinement(8, 50.0), seed=0
    )
    assert min(scores) == scores[0]
    for before, after in zip(found.layers, refined.layers, strict=True):
        assert torch.allclose(before.key.encoder, after.key.encoder, atol=1e-6)
        assert torch.allclose(before.value.encoder, after.value.encoder, atol=1e-6)


def test_a_stage_that_gets_worse_stops_early(profile: Callable[..., ErrorProfile]) -> None:
    _, scores = refine(
        tiny_model("llama"),
        profile(method="eigen"),
        tiny_blocks(4, 16),
        [written("llama")],
        Refinement(80, 50.0),
        seed=0,
    )
    assert len(scores) < 9


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    profile: Callable[..., ErrorProfile],
) -> None:
    runs = [
        refine(
            tiny_model("llama"),
            profile(method="weighted"),
            written("llama"),
            [written("llama")],
            Refinement(6),
            seed,
        )[0]
        for seed in (0, 0, 1)
    ]
    first, again, other = (run.layers[1].value.encoder for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_refined_profile_holds_errors_measured_on_its_own_bases(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    settings: dict[str, Any] = {
        "method": "weighted",
        "num_samples": 8,
        "sequence_length": 32,
        "profile_samples": 3,
    }
    # One block again and again: what progress is judged on is what is trained on, so that there is progress.
    blocks = Blocks.of(written("llama").tokens[:1].expand(8, -1), "one block")
    plain, refined = (tiny_profile(folder, blocks, **settings, refine_steps=steps) for steps in (0, 12))
    assert (plain.method["refine_steps"], refined.method["refine_steps"]) == (0, 12)
    model = tiny_model("llama")
    fitting, _ = blocks.split(FitSettings(**settings).holdout)
    with Seam(model, "pre") as seam:
        walk = LayerWalk(model, fitting.tokens, 4)
        for index, layer in enumerate(refined.layers):
            view = view_layer(walk, seam, index)
            bases = layer.bases(layer.ranks_key[2], layer.ranks_value[3])
            assert float(layer.error[2, 3]) == pytest.approx(view.compare(bases, [0, 1, 2]).error, rel=1e-5)
            assert float(layer.error[2, 3]) != float(plain.layers[index].error[2, 3])
            walk.advance()


@pytest.mark.parametrize(
    ("method", "steps", "expected"),
    [("oblique", None, 400), ("eigen", None, 0), ("eigen", 7, 7), ("oblique", 0, 0)],
)
def test_steps_are_the_methods_own_unless_told_otherwise(
    method: str, steps: int | None, expected: int
) -> None:
    assert FitSettings(method=method, refine_steps=steps).refinement_steps == expected


def test_settings_that_cannot_be_are_refused() -> None:
    for make in (
        lambda: FitSettings(refine_steps=-1),
        lambda: FitSettings(refine_steps=1.5),  # type: ignore[arg-type]
        lambda: MethodChoice.parse("oblique:joint:polish_steps=-1").settings(FitSettings()),
        lambda: MethodChoice.parse("oblique:joint:polish_steps=many").settings(FitSettings()),
        lambda: Refinement(0),
        lambda: Refinement(step_size=0.0),
    ):
        with pytest.raises(InvalidSetting, match=r"steps|step_size"):
            make()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mpt"])
def test_the_teacher_says_the_same_of_a_block_that_it_has_seen(architecture: str) -> None:
    """Softcaps, scales and norms behind the layers included."""
    model, block = tiny_model(architecture), tiny_blocks(2, 16)[1]
    with Seam(model, "post") as seam:
        teacher = _Teacher(seam)
        first, again = teacher.logits(block, 0), teacher.logits(block, 0)
        assert torch.equal(first, teacher.logits(block))
    assert torch.equal(first, again)
    assert torch.equal(first, model(block.tokens.unsqueeze(0), use_cache=False).logits[0, :-1])
