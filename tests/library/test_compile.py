"""A compressed model is compiled as the uncompressed one is: into one graph for the prompt, and one for each next token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import InternalTorchDynamoError, UserError
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel, StaticCache

from benchmarks.bench import MODEL
from orthokv.models.source import load_model, resolve_model
from orthokv.spec.vocabulary import KEY_MODES, KeyMode
from tests.support.tiny import ARCHITECTURES, tiny_model, tiny_seam, tiny_tokens

# Those whose uncompressed model does not compile into one graph, and what it breaks at.
BREAKS: dict[str, tuple[type[Exception], str]] = {
    # position_ids[:, past_seen_tokens:], where a static cache counts its tokens in a tensor
    "opt": (UserError, "Could not guard on data-dependent expression"),
    # position_bias[:, max(0, ...):], for the same reason; our forward takes the length from the keys and compiles
    "mpt": (InternalTorchDynamoError, "unbacked symbols"),
}
COMPILED = [name for name in ARCHITECTURES if name not in BREAKS or name == "mpt"]
QUICK = ["llama", "mpt"]
PROMPT, LENGTH = 9, 15  # the window of 12 is full on the way


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def decode(run: Any, model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a prompt and of token after token behind it, from a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    return torch.cat([run(part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1)


def compiled(model: Any, *, fullgraph: bool, backend: Any = "eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=fullgraph, backend=counter), counter


@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in COMPILED],
)
def test_a_compressed_model_compiles_into_one_graph_a_step(name: str, key_mode: KeyMode) -> None:
    model, ids = tiny_model(name), tiny_tokens(2, LENGTH)
    with tiny_seam(model, key_mode):
        expected = decode(model, model, ids)
        run, _ = compiled(model, fullgraph=True)
        found = decode(run, model, ids)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_left_out_does_not_compile_uncompressed_either(name: str) -> None:
    model, (kind, reason) = tiny_model(name), BREAKS[name]
    run, _ = compiled(model, fullgraph=True)
    with pytest.raises(kind, match=reason):
        decode(run, model, tiny_tokens(2, LENGTH))


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("smollm3", "opt", "gemma3_text"))],
)
def test_compression_adds_no_graph(name: str) -> None:
    """Up to the window, whose filling the compiler learns one step later: it knows counters by the path to them."""
    model, ids = tiny_model(name), tiny_tokens(2, 12)
    run, dense = compiled(model, fullgraph=False)
    decode(run, model, ids)
    for key_mode in KEY_MODES:
        torch._dynamo.reset()
        with tiny_seam(model, key_mode):
            run, compressed = compiled(model, fullgraph=False)
            decode(run, model, ids)
        assert compressed.frame_count <= dense.frame_count + (name == "gemma3_text")


@pytest.mark.slow
@pytest.mark.parametrize("key_mode", KEY_MODES)
def test_a_trained_model_runs_compiled_to_machine_code(key_mode: KeyMode) -> None:
    if not MODEL.is_dir():
        pytest.skip(f"the trained model is not here: {MODEL}")
    model: Any = load_model(resolve_model(str(MODEL))).float()
    ids = tiny_tokens(2, LENGTH)
    with tiny_seam(model, key_mode):
        expected = decode(model, model, ids)
        run, counter = compiled(model, fullgraph=True, backend="inductor")
        found = decode(run, model, ids)
    assert counter.frame_count == 2
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
