"""A model is taken as documented or refused with a sentence that names what is wrong; nothing of it runs."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from orthokv.models.source import ModelSource, load_model, load_tokenizer, resolve_device, resolve_model
from orthokv.spec.errors import (
    InvalidModel,
    InvalidSetting,
    ModelGated,
    ModelNotFound,
    ModelTooLarge,
    OrthoKVError,
    StorageError,
    UnsafeModel,
    UnsupportedModel,
)
from tests.support.hub import Hub, Repo, serve_hub
from tests.support.paths import DEMO

PICKLE = b"\x80\x04cposix\nsystem\n"


def tiny(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 48,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | options))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# A local folder


def test_folder_is_resolved_with_what_a_load_reads_and_nothing_else(folder: Path) -> None:
    for name in ("pytorch_model.bin", "modeling_llama.py", "chat_template.jinja", "README.md", "other.json"):
        (folder / name).write_bytes(PICKLE)
    source = resolve_model(str(folder))
    assert (source.id, source.revision, source.folder) == (str(folder), None, folder.resolve())
    assert source.files == ("config.json", "generation_config.json", "model.safetensors")


def test_loaded_model_is_the_saved_one(folder: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.INFO)
    source = resolve_model(str(folder))
    capfd.readouterr()
    model = load_model(source)
    assert capfd.readouterr() == ("", "")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, tiny().eval()(tokens).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert model.name_or_path == str(folder)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtype_and_attention_are_as_asked(tmp_path: Path, dtype: torch.dtype | None, attention: str) -> None:
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(resolve_model(str(tmp_path)), dtype=dtype, attn_implementation=attention)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.bfloat16}
    assert model.config._attn_implementation == attention


def test_tied_and_sharded_models_load(tmp_path: Path, sharded: Path) -> None:
    tied = tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    assert load_model(resolve_model(str(tmp_path / "tied"))).config.tie_word_embeddings
    source = resolve_model(str(sharded))
    assert sum(name.endswith(".safetensors") for name in source.files) > 2
    assert torch.equal(load_model(source).lm_head.weight, tiny().lm_head.weight)  # type: ignore[union-attr]


def test_digest_is_of_the_model_not_of_its_place_or_its_notes(folder: Path, tmp_path: Path) -> None:
    digest = resolve_model(str(folder)).digest
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("notes")
    edit(
        tmp_path / "copy" / "config.json",
        quantization_config={"quant_method": "orthokv", "format_version": 1},
    )
    assert resolve_model(str(tmp_path / "copy")).digest == digest
    assert not hasattr(load_model(resolve_model(str(tmp_path / "copy"))).config, "quantization_config")


@pytest.mark.parametrize("change", ["weights", "config"])
def test_digest_changes_with_weights_and_configuration(folder: Path, change: str) -> None:
    digest = resolve_model(str(folder)).digest
    if change == "weights":
        raw = bytearray((folder / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (folder / "model.safetensors").write_bytes(raw)
    else:
        edit(folder / "config.json", rms_norm_eps=1e-5)
    assert resolve_model(str(folder)).digest != digest


# Refusals


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def settle(name: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_of(shards: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    return change


def lead_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def overlap(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


REFUSALS: dict[str, tuple[Callable[[Path], None], type[OrthoKVError], str]] = {
    "no config": (drop("config.json"), InvalidModel, "has no config.json"),
    "config not JSON": (put("config.json", b"{"), InvalidModel, "config.json of .* is not valid JSON"),
    "config not UTF-8": (put("config.json", b'{"a": "\xff"}'), InvalidModel, "is not valid JSON"),
    "config too deep": (put("config.json", b"[" * 99999), InvalidModel, "is not valid JSON"),
    "config a list": (
        put("config.json", b"[]"),
        InvalidModel,
        "config.json of .* holds a list, not an object",
    ),
    "no weights": (
        drop("model.safetensors"),
        InvalidModel,
        "neither model.safetensors nor model.safetensors.index",
    ),
    "only pickles": (only_pickles, UnsafeModel, "only pickles, which can run code: pytorch_model.bin"),
    "cut weights": (
        cut,
        InvalidModel,
        "model.safetensors of .* is truncated or damaged: .*not fully covered",
    ),
    "empty weights": (put("model.safetensors", b""), InvalidModel, "truncated or damaged: header too small"),
    "offsets beyond": (overlap, InvalidModel, "model.safetensors of .* is truncated or damaged"),
    "missing shard": (
        index_of({"a": "b.safetensors"}),
        InvalidModel,
        "names b.safetensors, which is missing",
    ),
    "pickled shard": (index_of({"a": "b.bin"}), UnsafeModel, "names 'b.bin' for a: no safetensors"),
    "shard elsewhere": (index_of({"a": "../b.safetensors"}), UnsafeModel, "names '../b.safetensors' for a"),
    "no shards": (index_of({}), InvalidModel, "has no weight_map"),
    "link out": (
        lead_out("model.safetensors"),
        UnsafeModel,
        "model.safetensors of .* is a link that leads out",
    ),
    "config out": (lead_out("config.json"), UnsafeModel, "config.json of .* is a link that leads out"),
    "adapter": (put("adapter_config.json", b"{}"), UnsupportedModel, "adapter_config.json"),
    "quantised": (
        settle(quantization_config={"quant_method": "gptq"}),
        UnsupportedModel,
        "quantised with 'gptq'",
    ),
    "auto_map": (settle(auto_map={"AutoModel": "x.Y"}), UnsafeModel, "config.json of .* holds 'auto_map'"),
    "trust": (settle(trust_remote_code=True), UnsafeModel, "holds 'trust_remote_code'"),
    "pipelines": (settle(custom_pipelines={}), UnsafeModel, "holds 'custom_pipelines'"),
    "attention": (settle(_attn_implementation="owner/kernel"), UnsafeModel, "holds '_attn_implementation'"),
    "public attention": (
        settle(attn_implementation="owner/kernel"),
        UnsafeModel,
        "holds 'attn_implementation'",
    ),
    "internal": (
        settle(_attn_implementation_internal="owner/k"),
        UnsafeModel,
        "'_attn_implementation_internal'",
    ),
    "nested": (settle(text_config=[{"a": {"use_kernels": True}}]), UnsafeModel, "holds 'use_kernels'"),
    "private": (settle(_anything=1), UnsafeModel, "holds '_anything'"),
    "other weights": (settle(transformers_weights="../x.safetensors"), UnsafeModel, "'transformers_weights'"),
    "generation": (
        settle("generation_config.json", custom_generate="owner/name"),
        UnsafeModel,
        "generation_config.json of .* holds 'custom_generate'",
    ),
    "tokenizer": (
        put("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'),
        UnsafeModel,
        "tokenizer_config.json of .* holds 'auto_map'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_folder_is_refused(folder: Path, case: str) -> None:
    change, error, message = REFUSALS[case]
    change(folder)
    with pytest.raises(error, match=message) as caught:
        resolve_model(str(folder))
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_what_transformers_itself_wrote_is_no_reason_to_refuse(folder: Path) -> None:
    edit(folder / "config.json", _name_or_path="x", _commit_hash=None, _attn_implementation_autoset=True)
    (folder / "tokenizer_config.json").write_text('{"added": {"__type": "AddedToken", "_x": 1}}')
    load_model(resolve_model(str(folder)))


def test_link_inside_the_folder_and_link_to_the_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.data")
    (folder / "model.safetensors").symlink_to("weights.data")
    (tmp_path / "link").symlink_to(folder)
    assert resolve_model(str(tmp_path / "link")).folder == folder.resolve()


@pytest.mark.parametrize("name", ["missing/folder/here", "./missing", "/no/such/folder", "~/no/such/folder"])
def test_missing_folder_is_not_looked_up_on_the_hub(hub: Hub, name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"the model folder {name} does not exist"):
        resolve_model(name)
    assert not hub.requests


def test_file_and_revision_of_a_folder_are_refused(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config.json is a file, not the folder of a model"):
        resolve_model(str(folder / "config.json"))
    with pytest.raises(InvalidSetting, match="revision 'main' cannot be chosen"):
        resolve_model(str(folder), revision="main")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> ModelSource:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return resolve_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(folder: Path, name: str, value: float) -> None:
    source = rewrite(folder, lambda tensors: tensors[name].flatten()[-1:].fill_(value))
    with pytest.raises(InvalidModel, match=f"{name} of .* is not finite in torch.float32"):
        load_model(source)


def test_overflow_in_a_smaller_dtype_is_found(folder: Path) -> None:
    source = rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load_model(source)
    with pytest.raises(InvalidModel, match=r"model.norm.weight of .* is not finite in torch.float16"):
        load_model(source, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra has no place in the model"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(3, 32)}),
            r"lm_head.weight has shape \[3, 32\] instead of \[48",
        ),
        (lambda t: [t.pop(name) for name in list(t)[:9]], r"is missing; .* \(and 6 more\)"),
    ],
    ids=["missing", "unexpected", "other shape", "many"],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str, capfd: Any
) -> None:
    source = rewrite(folder, change)
    with pytest.raises(InvalidModel, match=f"weights of .* do not fit its config.json: .*{message}"):
        load_model(source)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model_type": "unheard-of"},
            UnsupportedModel,
            "model type 'unheard-of' of .* is not known to transformers",
        ),
        ({"model_type": None}, UnsupportedModel, "model type None of .* is not known"),
        ({"model_type": ["llama"]}, UnsupportedModel, "is not known"),
        ({"num_attention_heads": "many"}, InvalidModel, "config.json of .* is not valid"),
        ({"hidden_act": "unheard-of"}, InvalidModel, "cannot be loaded"),
    ],
)
def test_config_that_transformers_cannot_use_is_refused(
    folder: Path, changes: dict[str, Any], error: type[OrthoKVError], message: str
) -> None:
    edit(folder / "config.json", **changes)
    source = resolve_model(str(folder))
    with pytest.raises(error, match=message):
        load_model(source)


def test_architecture_without_causal_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=16)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"model type 't5' of .* is not a causal language model"):
        load_model(resolve_model(str(tmp_path)))


def test_missing_attention_kernel_is_a_setting_at_fault(folder: Path) -> None:
    with pytest.raises(InvalidSetting, match="attention 'flash_attention_2' is not installed"):
        load_model(resolve_model(str(folder)), attn_implementation="flash_attention_2")


# Tokenizers


def test_tokenizer_loads_from_the_checked_files() -> None:
    source = resolve_model(str(DEMO))
    tokenizer = load_tokenizer(source)
    ids = tokenizer("It was a dark night.", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "It was a dark night."
    assert tokenizer.name_or_path == str(DEMO)
    load_model(source)


def test_missing_and_damaged_tokenizers_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidModel, match=r"has no tokenizer: none of tokenizer.json, tokenizer.model"):
        load_tokenizer(resolve_model(str(folder)))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InvalidModel, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer(resolve_model(str(folder)))


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def files(saved: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in saved.iterdir()}
    risky = (
        "pytorch_model.bin",
        "modeling_x.py",
        "x.pt",
        "x.pkl",
        "chat_template.jinja",
        "sub/model.safetensors",
    )
    return found | dict.fromkeys(risky, PICKLE) | {"consolidated.safetensors": PICKLE, "README.md": b"notes"}


def test_hub_model_is_pinned_and_only_its_safe_files_are_requested(
    hub: Hub, files: dict[str, bytes], saved: Path
) -> None:
    hub.repos["owner/name"] = Repo(files)
    source = resolve_model("owner/name")
    assert source.revision == Repo(files).commit
    assert source.folder.name == source.revision
    assert source.digest == resolve_model(str(saved)).digest
    for suffix in (
        ".bin",
        ".py",
        ".pt",
        ".pkl",
        ".jinja",
        "sub/model.safetensors",
        "consolidated.safetensors",
    ):
        assert not hub.asked_for(suffix)
    assert {path.name for path in source.folder.iterdir()} == set(source.files)
    assert load_model(source).name_or_path == "owner/name"
    assert resolve_model(str(source.folder)).digest == source.digest


def test_too_large_a_model_is_refused_before_its_weights_are_requested(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.repos["owner/name"] = Repo(files)
    size = len(files["model.safetensors"])
    with pytest.raises(ModelTooLarge, match=f"{size} bytes of weights; {size - 1} are allowed"):
        resolve_model("owner/name", max_weight_bytes=size - 1)
    assert not hub.asked_for(".safetensors")
    assert resolve_model("owner/name", max_weight_bytes=size).id == "owner/name"


def test_a_download_without_room_is_not_begun(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["owner/name"] = Repo(files)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10))
    with pytest.raises(StorageError, match="the cache's disk has 10"):
        resolve_model("owner/name")
    assert not hub.asked_for(".safetensors")


def test_too_large_a_folder_is_refused(saved: Path) -> None:
    size = (saved / "model.safetensors").stat().st_size
    with pytest.raises(ModelTooLarge):
        resolve_model(str(saved), max_weight_bytes=size - 1)


@pytest.mark.parametrize("revision", [None, "main", "v2", "commit"])
def test_revision_becomes_the_commit(hub: Hub, files: dict[str, bytes], revision: str | None) -> None:
    repo = hub.repos["owner/name"] = Repo(files, branches=("main", "v2"))
    source = resolve_model("owner/name", revision=repo.commit if revision == "commit" else revision)
    assert source.revision == repo.commit


def test_sharded_hub_model_is_fetched_whole(hub: Hub, sharded: Path) -> None:
    hub.repos["owner/name"] = Repo({path.name: path.read_bytes() for path in sharded.iterdir()})
    source = resolve_model("owner/name")
    assert source.digest == resolve_model(str(sharded)).digest
    load_model(source)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model.safetensors": None}, UnsafeModel, "only pickles, which can run code: pytorch_model.bin"),
        (
            {"config.json": b'{"auto_map": {}}'},
            UnsafeModel,
            "config.json of model owner/name holds 'auto_map'",
        ),
        ({"config.json": None}, InvalidModel, "model owner/name has no config.json"),
        ({"adapter_config.json": b"{}"}, UnsupportedModel, "owner/name holds an adapter"),
        (
            dict.fromkeys(("model.safetensors", "pytorch_model.bin", "x.pt", "x.pkl"))
            | {"sub/x.bin": PICKLE},
            InvalidModel,
            "neither model.safetensors nor",
        ),
        (
            {
                "model.safetensors": None,
                "model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}',
            },
            InvalidModel,
            "names b.safetensors, which is missing",
        ),
    ],
)
def test_hub_model_is_refused_before_its_weights_are_requested(
    hub: Hub, files: dict[str, bytes], changes: dict[str, Any], error: type[OrthoKVError], message: str
) -> None:
    files |= changes
    hub.repos["owner/name"] = Repo({name: data for name, data in files.items() if data is not None})
    with pytest.raises(error, match=message):
        resolve_model("owner/name")
    assert not hub.asked_for(".safetensors")
    assert not hub.asked_for(".bin")


def test_truncated_hub_weights_are_named(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos["owner/name"] = Repo(files | {"model.safetensors": files["model.safetensors"][:-1]})
    with pytest.raises(InvalidModel, match=r"model.safetensors of model owner/name is truncated or damaged"):
        resolve_model("owner/name")


def test_missing_gated_and_unknown_revision_are_told_apart(hub: Hub, files: dict[str, bytes]) -> None:
    hub.repos |= {"owner/name": Repo(files), "owner/gated": Repo(files, gated=True)}
    with pytest.raises(
        ModelNotFound, match="owner/other is neither a folder nor a model that the hub shows you"
    ):
        resolve_model("owner/other")
    with pytest.raises(ModelGated, match="model owner/gated is gated: accept its terms"):
        resolve_model("owner/gated")
    with pytest.raises(ModelNotFound, match="model owner/name has no revision 'v9'"):
        resolve_model("owner/name", revision="v9")
    with pytest.raises(ModelNotFound, match=r"has no revision '0{40}'"):
        resolve_model("owner/name", revision="0" * 40)
    with pytest.raises(ModelNotFound, match="the model folder owner/a--b does not exist"):
        resolve_model("owner/a--b")


def test_unreachable_hub_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.down = True
    with pytest.raises(
        ModelNotFound, match=r"\Athe hub answers with status 503 when asked for model owner/name\Z"
    ):
        resolve_model("owner/name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ModelNotFound, match=r"\Athe hub cannot be reached for owner/name, and no copy is cached\Z"
    ):
        resolve_model("owner/name")


def test_cached_model_needs_no_hub(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["owner/name"] = Repo(files)
    first = resolve_model("owner/name", cache_dir=tmp_path / "mine")
    assert first.folder.is_relative_to(tmp_path / "mine")
    hub.requests.clear()
    assert resolve_model("owner/name", revision=first.revision, cache_dir=tmp_path / "mine") == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("owner/name", cache_dir=tmp_path / "mine") == first
    assert not hub.requests
    with pytest.raises(ModelNotFound, match="no copy is cached"):
        resolve_model("owner/other", cache_dir=tmp_path / "mine")


# Devices


def test_devices_of_this_machine_are_resolved() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (resolve_device("auto").type == "cpu") is not accelerated


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "", "cuda:x", "CPU", "cpu:0"])
def test_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"device '{name}' is not available: choose from auto, .*cpu"):
        resolve_device(name)
