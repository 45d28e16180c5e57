"""The verbs that `import orthokv` gives: ids, paths or a loaded model in, a checkpoint out; bad input is one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import orthokv
from orthokv.fit.methods import METHODS
from orthokv.fit.methods.eigen import Eigen
from orthokv.models.source import resolve_model
from orthokv.spec import methods as spec
from orthokv.spec.errors import InvalidSetting, OrthoKVError
from orthokv.spec.methods import MethodSettings
from orthokv.spec.names import CONFIG, TENSORS
from orthokv.text.source import TextMixture
from tests.support.tiny import tiny_folder, tiny_model, tiny_text

QUICK: dict[str, Any] = {"method": "eigen", "num_samples": 4, "sequence_length": 16, "profile_samples": 1}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text(2000))
    return path


@pytest.fixture(scope="session")
def small(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "small"
    orthokv.compress(folder, text, kept=0.5, out=out, **QUICK)
    return out


def loaded(folder: Path, **changes: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **changes)
    return model


# ------------------------------------------------------------------------------------------------ the package


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, orthokv; print(*{'torch', 'transformers', 'numpy'} & {*sys.modules}); orthokv.plan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_name_of_the_face_is_there_and_has_a_docstring() -> None:
    for name in orthokv.__all__:
        found = getattr(orthokv, name)
        assert name in dir(orthokv)
        assert name == "__version__" or found.__doc__


def test_no_folder_of_the_library_hides_a_verb() -> None:
    """Importing `orthokv.x` sets the attribute `x` of the package: a verb of that name would become a module."""
    folders = {path.stem for path in Path(orthokv.__file__).parent.iterdir()}
    assert not folders & {*orthokv.__all__}


# ---------------------------------------------------------------------------------------------------- compress


def test_a_model_and_a_text_become_a_checkpoint_with_what_was_measured(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    made = orthokv.compress(str(folder), str(text), kept=0.5, out=str(tmp_path / "out"), **QUICK)
    assert made.checkpoint.folder == tmp_path / "out"
    assert made.plan.kept <= 0.5
    assert made.measured["kept"] == pytest.approx(made.plan.kept)
    assert orthokv.read_checkpoint(tmp_path / "out").config["method"]["name"] == "eigen"


def test_a_loaded_model_gives_the_same_checkpoint_and_stays_as_it_was(
    folder: Path, text: Path, small: Path, tmp_path: Path
) -> None:
    model = loaded(folder).train()
    frozen = next(model.parameters()).requires_grad_(False)
    orthokv.compress(model, text, kept=0.5, out=tmp_path / "out", **QUICK)
    assert (tmp_path / "out" / CONFIG).read_text() == (small / CONFIG).read_text()
    one, other = load_file(tmp_path / "out" / TENSORS), load_file(small / TENSORS)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert model.training
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    orthokv.attach(model, tmp_path / "out")


def test_a_loaded_model_is_used_in_its_own_dtype(folder: Path, text: Path, tmp_path: Path) -> None:
    model = loaded(folder, dtype=torch.bfloat16)
    made = orthokv.compress(model, text, kept=0.5, out=tmp_path / "out", **QUICK)
    assert made.measured["dtype"] == "bfloat16"
    assert orthokv.read_checkpoint(tmp_path / "out").config["base_model"]["digest"] == (
        resolve_model(str(folder)).digest
    )


def test_settings_and_target_say_the_same_as_keywords(
    folder: Path, text: Path, small: Path, tmp_path: Path
) -> None:
    settings = orthokv.FitSettings(**QUICK)
    target = orthokv.Target(orthokv.Budget("kept", 0.5))
    orthokv.compress(resolve_model(str(folder)), text, settings=settings, target=target, out=tmp_path / "out")
    assert (tmp_path / "out" / TENSORS).read_bytes() == (small / TENSORS).read_bytes()


def test_a_list_of_texts_is_a_mixture(folder: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(f'{{"body": "{tiny_text(2000, seed=1)}"}}\n')
    texts = [text, orthokv.TextSource(str(other), field="body")]
    made = orthokv.compress(folder, texts, kept=0.5, out=tmp_path / "out", **QUICK)
    assert made.profile.dataset["source"] == "text.txt + other.jsonl"
    mixed = TextMixture((orthokv.TextSource(str(text)), texts[1]))  # type: ignore[arg-type]
    again = orthokv.compress(folder, mixed, kept=0.5, out=tmp_path / "again", **QUICK)
    assert again.profile.dataset == made.profile.dataset


def test_a_block_is_as_long_as_the_models_context_where_nothing_is_asked(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    settings = {**QUICK, "num_samples": 2}
    del settings["sequence_length"]
    made = orthokv.compress(folder, "self", kept=0.5, out=tmp_path / "out", **settings)
    assert made.profile.dataset["sequence_length"] == 256


Refused = tuple[dict[str, Any], str]
ONE = {"kept": 0.5}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "give exactly one budget of kept, layer_error, perplexity_increase"),
        ({**ONE, "layer_error": 0.1}, "give exactly one budget of kept, layer_error, perplexity_increase"),
        ({"kept": 1.5}, "kept must be above 0 and at most 1, not 1.5"),
        ({**ONE, "num_sample": 8}, "compress has no setting 'num_sample': did you mean 'num_samples'"),
        ({**ONE, "colour": 8}, "compress has no setting 'colour': settings are allocation, batch_size, "),
        ({**ONE, "budget": 0.5}, "compress has no setting 'budget'"),
        ({**ONE, "form": "whole"}, "form must be one of adapter, full, not 'whole'"),
        ({"kept": "half"}, "Budget: "),
        (
            {**ONE, "settings": orthokv.FitSettings(), "method": "eigen"},
            "settings holds method already: give settings or its parts by name, not both",
        ),
        (
            {**ONE, "target": orthokv.Target(orthokv.Budget("kept", 0.5))},
            "target holds kept already: give target or its parts by name, not both",
        ),
        (
            {"target": orthokv.Target(orthokv.Budget("kept", 0.5)), "form": "full"},
            "target holds form already",
        ),
        ({**ONE, "spill": "nowhere"}, "spill nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_looked_for(
    given: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting) as refused:
        orthokv.compress(tmp_path / "no-such-model", "no-such-text.txt", out=tmp_path / "out", **given)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": "magic"}, "method must be one of eigen, stiefel, weighted, oblique, palu, not 'magic'"),
        ({"num_samples": "many"}, "FitSettings: "),
        ({"revision": "main"}, "revision 'main' cannot be chosen"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(
    given: dict[str, Any], sentence: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting) as refused:
        orthokv.compress(folder, text, kept=0.5, out=tmp_path / "out", **given)
    assert str(refused.value).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_no_text_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="name at least one text"):
        orthokv.compress(folder, [], kept=0.5, out=tmp_path / "out", **QUICK)


def test_a_folder_that_is_taken_is_not_touched(folder: Path, text: Path, small: Path) -> None:
    before = {path: path.read_bytes() for path in small.iterdir()}
    with pytest.raises(InvalidSetting, match="exists and is not an empty folder"):
        orthokv.compress(folder, text, kept=0.5, out=small, **QUICK)
    assert {path: path.read_bytes() for path in small.iterdir()} == before


# --------------------------------------------------------------------------- loaded models that cannot be used


def made_in_memory(folder: Path) -> Any:
    return tiny_model("llama")


def trained_further(folder: Path) -> Any:
    model = loaded(folder)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.k_proj").weight.add_(0.1)
    return model


def gone(folder: Path) -> Any:
    model = loaded(folder)
    model.config._name_or_path = str(folder / "gone")
    return model


def spread(folder: Path) -> Any:
    model: Any = loaded(folder)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    return model


def quantised(folder: Path) -> Any:
    model = loaded(folder)
    for name in ("k_proj", "v_proj"):
        projection: Any = model.get_submodule(f"model.layers.0.self_attn.{name}")
        projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    return model


def no_model(folder: Path) -> Any:
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (made_in_memory, "the model was not loaded from files"),
        (trained_further, "the weights of the loaded model are not those of "),
        (gone, "the model folder "),
        (spread, "the model is spread over 0, cpu: load it on one device"),
        (quantised, "the weights of the loaded model are quantised"),
        (no_model, "a model is a folder, a hub id or a PreTrainedModel of transformers, not a Linear"),
    ],
)
def test_a_loaded_model_whose_files_are_not_its_own_is_refused(
    make: Callable[[Path], Any], sentence: str, folder: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrthoKVError) as refused:
        orthokv.compress(make(folder), text, kept=0.5, out=tmp_path / "out", **QUICK)
    assert str(refused.value).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_checkpoint_attached_is_refused_and_stays_attached(
    folder: Path, text: Path, small: Path, tmp_path: Path
) -> None:
    model = orthokv.attach(loaded(folder), small)
    with pytest.raises(InvalidSetting, match="a checkpoint is attached to the model"):
        orthokv.compress(model, text, kept=0.5, out=tmp_path / "out", **QUICK)
    orthokv.detach(model)


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"streaming": "on"}])
def test_a_loaded_model_is_not_moved(folder: Path, text: Path, where: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="have no effect: the model is loaded, on cpu"):
        orthokv.compress(loaded(folder), text, kept=0.5, out=tmp_path / "out", **where, **QUICK)


# ----------------------------------------------------------------------------------------- plan and evaluate


def test_another_budget_needs_the_profile_alone(small: Path, tmp_path: Path) -> None:
    profile = orthokv.load_profile(small)
    plan = orthokv.plan(profile, kept=0.25)
    assert plan.kept <= 0.25
    written = orthokv.plan(small, kept=0.25, out=tmp_path / "quarter", grid=orthokv.RankGrid(2))
    assert all(rank % 2 == 0 for pair in written.ranks for rank in pair)
    found = orthokv.read_checkpoint(tmp_path / "quarter")
    assert tuple((bases.key.rank, bases.value.rank) for bases in found.bases) == written.ranks


def test_a_full_checkpoint_takes_the_model_that_the_profile_names(small: Path, tmp_path: Path) -> None:
    orthokv.plan(small, kept=0.25, out=tmp_path / "full", form="full")
    assert loaded(tmp_path / "full")._orthokv_seam  # type: ignore[truthy-bool]  # bases came with it


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "give exactly one budget of kept, layer_error"),
        ({"kept": 0.5, "method": "eigen"}, "plan has no setting 'method': settings are allocation, codec"),
        (
            {"target": orthokv.Target(orthokv.Budget("perplexity_increase", 0.1))},
            "a perplexity_increase budget needs the model and held-out text",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(small: Path, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        orthokv.plan(small, **given)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("how", ["recorded", "path", "loaded"])
def test_a_checkpoint_is_measured_on_its_own_model_however_that_is_given(
    how: str, folder: Path, small: Path, text: Path
) -> None:
    model = {"recorded": None, "path": folder, "loaded": loaded(folder)}[how]
    found = orthokv.evaluate(small, text, model=model, num_samples=2, sequence_length=16, speed=how == "path")
    assert found["perplexity"] > 1
    assert found["kept"] == pytest.approx(orthokv.read_checkpoint(small).config["cache"]["kept"])
    assert ("tokens_per_second" in found) == (how == "path")


def test_a_checkpoint_is_not_measured_on_text_of_the_models_own(small: Path) -> None:
    with pytest.raises(InvalidSetting, match="measuring needs text that the model did not write itself"):
        orthokv.evaluate(small, "self")


# ------------------------------------------------------------------------------------------ methods of one's own


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for module in (spec, sys.modules[METHODS["eigen"].__module__.rpartition(".")[0]]):
        monkeypatch.setattr(module, "METHODS", dict(module.METHODS))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Scaled(MethodSettings):
    """EigenAttention's bases under another name."""

    name: ClassVar[str] = "scaled"
    note: str = "none"

    def fit(self, view: Any, sharing: Any, seed: int) -> Any:
        return Eigen().fit(view, sharing, seed)


@pytest.mark.usefixtures("methods")
def test_a_method_of_ones_own_is_fitted_by_its_name(
    folder: Path, text: Path, small: Path, tmp_path: Path
) -> None:
    orthokv.register_method(Scaled)
    settings = {**QUICK, "method": "scaled", "options": {"note": "mine"}}
    orthokv.compress(folder, text, kept=0.5, out=tmp_path / "out", **settings)
    assert (tmp_path / "out" / TENSORS).read_bytes() == (small / TENSORS).read_bytes()
    assert orthokv.read_checkpoint(tmp_path / "out").config["method"] == {
        "name": "scaled",
        "note": "mine",
        "refine_steps": 0,
    }


@pytest.mark.usefixtures("methods")
def test_the_newer_class_of_a_name_counts() -> None:
    orthokv.register_method(Scaled)
    again = dataclass(frozen=True)(type("Again", (Scaled,), {}))
    assert orthokv.register_method(again) is again
    assert spec.METHODS["scaled"] is again


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (object, "a method is a dataclass on MethodSettings"),
        (MethodSettings, "the method MethodSettings needs a class variable 'name' and a function 'fit'"),
        (Eigen, "the name 'eigen' of Eigen is a built-in method's"),
    ],
)
def test_what_is_no_method_of_ones_own_is_refused(kind: Any, sentence: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        orthokv.register_method(kind)
    assert str(refused.value).startswith(sentence)
