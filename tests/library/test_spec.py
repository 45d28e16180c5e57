"""Words without torch: what they refuse, what they cost to import, and bytes that are counted in one place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from orthokv.bases.manifold import RETRACTIONS
from orthokv.fit.methods import METHODS as FITTING
from orthokv.fit.methods import method_of
from orthokv.spec.budget import METRICS, Budget
from orthokv.spec.codec import CodecSpec, codec_spec
from orthokv.spec.errors import InvalidSetting
from orthokv.spec.footprint import LayerPlan, SidePlan
from orthokv.spec.hub_ids import is_hub_id, is_repository
from orthokv.spec.methods import METHODS
from orthokv.spec.settings import FitSettings
from orthokv.spec.target import Target
from orthokv.spec.vocabulary import CODECS, MethodName, Retraction
from tests.library.test_written_before import WRITTEN


def allowed_by_the_hub(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


@given(st.text(alphabet="aZ09-_./é ", max_size=12))
def test_a_hub_id_is_what_the_hub_takes(text: str) -> None:
    assert is_hub_id(text) == allowed_by_the_hub(text)


@pytest.mark.parametrize(
    "text",
    [
        "_x/y",
        "école/x",
        "a--b/c",
        "a..b/c",
        "x/y.git",
        "a" * 96,
        "a" * 97,
        f"{'a' * 96}/{'b' * 96}",
        "a/b/c",
        "a\n",
    ],
)
def test_ids_that_five_rules_once_disagreed_about(text: str) -> None:
    assert is_hub_id(text) == allowed_by_the_hub(text)
    assert is_repository(text) == ("/" in text and allowed_by_the_hub(text))


def test_every_method_has_settings_and_a_fit() -> None:
    assert set(METHODS) == set(FITTING) == set(MethodName.__args__)  # type: ignore[attr-defined]
    for name, kind in METHODS.items():
        assert method_of(kind()).name == name
    assert set(RETRACTIONS) == set(Retraction.__args__)  # type: ignore[attr-defined]


codecs = st.builds(
    CodecSpec,
    name=st.just("any"),
    bits=st.integers(1, 32),
    block=st.integers(1, 8),
    scale_bits=st.integers(0, 64),
    window=st.integers(0, 16),
    sinks=st.integers(0, 4),
)


@given(codecs, st.integers(1, 64), st.integers(0, 100))
def test_stored_bytes_are_those_of_packed_blocks_and_of_tokens_kept_whole(
    codec: CodecSpec, rank: int, tokens: int
) -> None:
    exact = codec.exact_tokens(tokens)
    assert 0 <= exact <= tokens
    assert (tokens - exact) % codec.block == 0
    assert exact >= min(tokens, codec.sinks + codec.window)
    assert exact < codec.sinks + codec.window + codec.block
    blocks = (tokens - exact) // codec.block
    assert codec.stored_bytes(rank, tokens, 64) == blocks * codec.row_bytes(rank) + exact * 64 * 2
    assert 8 * codec.row_bytes(rank) >= codec.bits * rank * codec.block + codec.scale_bits
    assert 8 * (codec.row_bytes(rank) - 1) < codec.bits * rank * codec.block + codec.scale_bits


@given(st.integers(1, 1024), st.integers(1, 16), st.sampled_from(CODECS), st.sampled_from([2, 4]))
def test_a_token_takes_a_row_of_each_group(rank: int, groups: int, name: str, number_bytes: int) -> None:
    side = SidePlan(rank, groups, codec_spec(name, number_bytes))
    width = 2 if name == "16-bit" else number_bytes
    assert side.token_bytes == groups * rank * width
    assert LayerPlan(side, side).token_bytes == 2 * side.token_bytes


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"allocation": "best"}, "allocation must be one of .* not 'best'"),
        ({"form": "zip"}, "form must be one of adapter, full, not 'zip'"),
        ({"codec": "int3"}, "codec must be one of 16-bit, native, not 'int3'"),
        ({"polish_steps": -1}, "polish_steps must be a whole number, at least 0, not -1"),
        ({"budget": Budget("layer_error", 0.1), "polish_steps": 3}, "a layer_error budget is not polished"),
    ],
)
def test_a_target_that_cannot_be_is_refused_when_it_is_made(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        Target(**{"budget": Budget(METRICS[0], 0.5), **change})  # type: ignore[arg-type]


def test_settings_of_another_method_are_refused_when_they_are_made() -> None:
    with pytest.raises(InvalidSetting, match="method 'eigen' has no setting steps"):
        FitSettings(method="eigen", steps=3)
    with pytest.raises(InvalidSetting, match="method must be one of"):
        FitSettings(method="pca")


def loaded_by(program: str) -> list[str]:
    """Names of all modules that a program has loaded at its end, in a process of its own."""
    said = "; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program + said], capture_output=True, text=True, check=True, timeout=120
    )
    return list(json.loads(done.stdout))


def test_words_load_no_library() -> None:
    loaded = loaded_by("import orthokv.spec.target, orthokv.spec.check, orthokv.spec.records")
    assert not {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "pydantic"} & set(loaded)


def test_a_checkpoint_is_read_without_modelling_code_or_methods() -> None:
    folder = WRITTEN / "full-after-rope"
    loaded = loaded_by(
        f"from pathlib import Path; from orthokv.checkpoint.read import read_checkpoint; read_checkpoint(Path({str(folder)!r}))"
    )
    assert "transformers" not in loaded
    rooms = {name.split(".")[1] for name in loaded if name.startswith("orthokv.")}
    assert rooms == {"spec", "files", "bases", "checkpoint"}
