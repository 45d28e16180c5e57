"""A checkpoint gives back what was written, or refuses with the file, tensor or field that is wrong; detach leaves no trace."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import orthokv
from orthokv.checkpoint.read import Checkpoint, read_checkpoint
from orthokv.checkpoint.write import record_measurements, write_checkpoint
from orthokv.files.digests import SUMS, verify_files
from orthokv.models.source import ModelSource, resolve_model
from orthokv.planning.allocate import allocate
from orthokv.planning.plan import Plan, layer_plans
from orthokv.planning.profile import PROFILE_JSON, PROFILE_TENSORS, ErrorProfile
from orthokv.runtime.seam import seam_of
from orthokv.spec.budget import Budget
from orthokv.spec.errors import (
    CheckpointMismatch,
    InvalidCheckpoint,
    InvalidSetting,
    OrthoKVError,
    StorageError,
    UnsupportedModel,
)
from orthokv.spec.names import CARD, CONFIG, TENSORS
from orthokv.spec.vocabulary import FORMS, KEY_MODES
from tests.support.tiny import (
    ARCHITECTURES,
    EAGER_ONLY,
    GROUPINGS,
    tiny_folder,
    tiny_model,
    tiny_profile,
    tiny_tokens,
)

FILES = (CONFIG, TENSORS, PROFILE_JSON, PROFILE_TENSORS, CARD, SUMS)
MEASURED: dict[str, Any] = {
    "perplexity": 2.0,
    "perplexity_dense": 1.5,
    "kl": 0.1,
    "kept": 0.5,
    "cache_bytes_per_token": 190,
    "cache_bytes_per_token_dense": 384,
    "tokens": 10,
    "layer_error": [0.1, 0.2, 0.3],
    "layer_cosine": [0.9, 0.8, 0.7],
    "dtype": "float32",
    "dataset": {"source": "x", "digest": "y", "num_samples": 1, "sequence_length": 11, "starts": [0]},
}


@dataclass(frozen=True)
class Made:
    """A model on disk, its profile and a plan at about half the cache."""

    folder: Path
    source: ModelSource
    profile: ErrorProfile
    plan: Plan

    def write(self, out: Path, **options: Any) -> Checkpoint:
        return write_checkpoint(self.profile, self.plan, out, base=self.source, **options)


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    @cache
    def made(architecture: str = "llama", seed: int = 0, **settings: Any) -> Made:
        folder = tiny_folder(tmp_path_factory.mktemp("base"), architecture, seed)
        profile = tiny_profile(folder, **settings)
        return Made(folder, resolve_model(str(folder)), profile, allocate(profile, Budget("kept", 0.5)))

    return made


@pytest.fixture(scope="session")
def sound_adapter(make: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "checkpoint"
    make().write(out)
    return out


@pytest.fixture
def adapter(sound_adapter: Path, tmp_path: Path) -> Path:
    """A sound adapter of tiny llama that a test may spoil."""
    return Path(shutil.copytree(sound_adapter, tmp_path / "adapter"))


@pytest.fixture(scope="session")
def full(make: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound full checkpoint of tiny llama: read only."""
    out = tmp_path_factory.mktemp("full") / "checkpoint"
    make().write(out, form="full")
    return out


def resealed(folder: Path) -> None:
    """Bring the digests up to date, as someone who alters a checkpoint on purpose would."""
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name != SUMS:
            lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    (folder / SUMS).write_text("".join(lines))


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / CONFIG).read_text())
    change(data)
    (folder / CONFIG).write_text(json.dumps(data))
    resealed(folder)


def retensored(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    resealed(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@torch.no_grad()
def logits(model: PreTrainedModel, length: int = 24) -> Tensor:
    found: Tensor = model(tiny_tokens(2, length, seed=9), use_cache=False).logits
    return found


# --------------------------------------------------------------------------------------- write, then read


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_is_what_was_written(
    form: str, architecture: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make(architecture)
    written = made.write(tmp_path / "out", form=form)
    found = read_checkpoint(tmp_path / "out")
    assert found.config == written.config
    assert found.geometry == made.profile.geometry
    assert (found.key_mode, found.sharing) == (made.profile.key_mode, made.profile.sharing)
    for layer, ranks, bases in zip(made.profile.layers, made.plan.ranks, found.bases, strict=True):
        expected = layer.bases(*ranks)
        for basis, wanted in ((bases.key, expected.key), (bases.value, expected.value)):
            assert basis is not None
            assert wanted is not None
            assert torch.equal(basis.encoder, wanted.encoder)
            assert torch.equal(basis.decoder, wanted.decoder)
            assert basis.orthonormal == wanted.orthonormal
    verify_files(tmp_path / "out")
    assert ErrorProfile.load(tmp_path / "out").to_dict() == made.profile.to_dict()


@pytest.mark.parametrize("sharing", GROUPINGS)
@pytest.mark.parametrize("key_mode", KEY_MODES)
@pytest.mark.parametrize("method", ["eigen", "weighted"])
def test_every_kind_of_basis_goes_through_a_file(
    method: str, key_mode: str, sharing: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make("llama", method=method, key_mode=key_mode, sharing=sharing)
    found = made.write(tmp_path / "out")
    for layer, ranks, bases in zip(made.profile.layers, made.plan.ranks, found.bases, strict=True):
        for basis, wanted in zip((bases.key, bases.value), (layer.key, layer.value), strict=True):
            assert basis is not None
            assert torch.equal(basis.decoder, wanted.decoder[..., : basis.rank])
        assert bases.key is not None
        assert bases.value is not None
        assert (bases.key.rank, bases.value.rank) == ranks
    assert found.config["cache"]["bytes_per_token"] == made.plan.bytes_per_token
    assert found.declared_bytes(sequences=2, tokens=10) == 20 * made.plan.bytes_per_token


def test_the_configuration_says_where_the_checkpoint_comes_from(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make()
    config = made.write(tmp_path / "out").config
    assert config["format_version"] == 1
    assert config["producer"] == {"name": "orthokv", "version": orthokv.__version__}
    assert config["base_model"]["id"] == str(made.folder)
    assert config["base_model"]["digest"] == made.source.digest
    assert config["geometry"]["rope"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert len(config["geometry"]["rope_hash"]) == 64
    assert config["codec"] == {"name": "16-bit"}
    assert config["calibrated_positions"] == 16
    assert config["dataset"]["digest"] == made.profile.dataset["digest"]
    assert config["seed"] == 0
    for entry, (key, value) in zip(config["ranks"], made.plan.ranks, strict=True):
        assert (entry["key"]["rank"], entry["value"]["rank"]) == (key, value)
        assert entry["key"]["per_head"] == entry["key"]["total"] / 4


def test_a_checkpoint_holds_no_pickle_and_no_code(adapter: Path) -> None:
    assert {path.name for path in adapter.iterdir()} == set(FILES)


def test_the_same_plan_written_twice_is_the_same_bytes(make: Callable[..., Made], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    make().write(tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_a_full_checkpoint_keeps_the_base_models_files_as_they_are(
    make: Callable[..., Made], full: Path
) -> None:
    base, made = snapshot(make().folder), snapshot(full)
    for name in set(base) - {"config.json"}:
        assert made[name] == base[name], name
    config = json.loads(made["config.json"])
    assert config.pop("quantization_config") == {
        "quant_method": "orthokv",
        "format_version": 1,
        "key_mode": "pre",
        "sharing": "joint",
    }
    assert config == json.loads(base["config.json"])


def test_a_full_checkpoint_keeps_the_chat_template(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    profile = tiny_profile(folder)
    plan = allocate(profile, Budget("kept", 0.5))
    write_checkpoint(profile, plan, tmp_path / "out", form="full", base=resolve_model(str(folder)))
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_a_full_checkpoint_of_another_model_than_the_profiles_is_not_written(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    other = make("llama", seed=1).source
    with pytest.raises(OrthoKVError):
        write_checkpoint(make().profile, make().plan, tmp_path / "out", form="full", base=other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [({"form": "half"}, "'half'")],
    ids=["form"],
)
def test_an_unknown_form_is_refused_before_anything_is_written(
    options: dict[str, Any], named: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    with pytest.raises(InvalidSetting, match=named):
        make().write(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_full_checkpoint_needs_the_base_models_files(make: Callable[..., Made], tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="base model"):
        write_checkpoint(make().profile, make().plan, tmp_path / "out", form="full")


def test_a_folder_that_is_taken_is_left_alone(make: Callable[..., Made], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(InvalidSetting, match="not an empty folder"):
        make().write(tmp_path / "out")
    assert snapshot(tmp_path) == {"out/precious": b"keep"}


def test_a_file_in_the_way_is_left_alone(make: Callable[..., Made], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("keep")
    with pytest.raises(InvalidSetting, match="not an empty folder"):
        make().write(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "keep"


def test_an_empty_folder_and_missing_parents_are_taken(make: Callable[..., Made], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make().write(tmp_path / "empty")
    make().write(tmp_path / "a" / "b" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_a_parent_that_is_a_file_is_one_sentence(make: Callable[..., Made], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        make().write(tmp_path / "file" / "out")


def test_a_plan_above_the_width_is_refused(make: Callable[..., Made], tmp_path: Path) -> None:
    plan = replace(make().plan, layers=layer_plans(make().profile, [(33, 4), (4, 4), (4, 4)]))
    with pytest.raises(InvalidSetting, match=r"rank 33 is outside 1\.\.32"):
        write_checkpoint(make().profile, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_measurements_are_recorded_in_a_checkpoint_that_stays_sound(adapter: Path) -> None:
    record_measurements(adapter, MEASURED)
    verify_files(adapter)
    assert read_checkpoint(adapter).config["measured"] == MEASURED


# ---------------------------------------------------------------------------------------- a disk that is full


FULL_DISK = """
    import json, resource, signal, sys
    from pathlib import Path
    import orthokv
    from orthokv.planning.allocate import allocate
    from orthokv.spec.budget import Budget
    from orthokv.checkpoint.write import record_measurements, write_checkpoint
    from orthokv.spec.errors import StorageError
    from orthokv.planning.profile import ErrorProfile
    from orthokv.models.source import resolve_model

    disk, measured = Path(sys.argv[1]), json.loads(sys.argv[4])
    profile = ErrorProfile.load(Path(sys.argv[2]))
    plan = allocate(profile, Budget("kept", 0.5))
    source = resolve_model(sys.argv[3])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    said = {}
    for case in json.loads(sys.argv[5]):
        what, limit = case
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            if what == "record":
                record_measurements(disk / f"{what}-{limit}", measured)
            else:
                write_checkpoint(profile, plan, disk / f"{what}-{limit}" / "out", form=what, base=source)
        except StorageError as error:
            said[f"{what}-{limit}"] = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps(said))
"""
# The limits stop the first byte, a file in the middle, and the copy of the base model.
WRITES = (("adapter", 1), ("adapter", 6000), ("full", 30_000))
RECORDS = (("record", 100), ("record", 2500))


@dataclass(frozen=True)
class Disk:
    """What a process left behind, and what it said, whose files could not grow beyond some bytes."""

    folder: Path
    said: dict[str, str]


@pytest.fixture(scope="session")
def disk(make: Callable[..., Made], sound_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    folder = tmp_path_factory.mktemp("disk")
    for what, limit in WRITES:
        (folder / f"{what}-{limit}").mkdir()
    for what, limit in RECORDS:
        shutil.copytree(sound_adapter, folder / f"{what}-{limit}")
    cases = json.dumps([*WRITES, *RECORDS])
    said = fresh(FULL_DISK, folder, sound_adapter, make().folder, json.dumps(MEASURED), cases)
    return Disk(folder, said)


@pytest.mark.parametrize(("form", "limit"), WRITES)
def test_a_full_disk_while_writing_leaves_nothing_behind(form: str, limit: int, disk: Disk) -> None:
    said = disk.said[f"{form}-{limit}"]
    assert said.startswith("cannot write")
    assert "nothing was left behind" in said
    assert list((disk.folder / f"{form}-{limit}").iterdir()) == []


@pytest.mark.parametrize(("what", "limit"), RECORDS)
def test_a_full_disk_while_recording_measurements_leaves_the_checkpoint_sound(
    what: str, limit: int, disk: Disk, sound_adapter: Path
) -> None:
    assert "cannot write" in disk.said[f"{what}-{limit}"]
    read_checkpoint(disk.folder / f"{what}-{limit}")
    assert snapshot(disk.folder / f"{what}-{limit}") == snapshot(sound_adapter)


# ------------------------------------------------------------------------------- truncated, altered, missing


def flip(path: Path, share: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(share * (len(raw) - 1))] ^= 0x01
    path.write_bytes(raw)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", [name for name in FILES if name != SUMS])
def test_one_flipped_byte_in_any_file_is_found_and_the_file_named(
    adapter: Path, name: str, share: float
) -> None:
    flip(adapter / name, share)
    with pytest.raises(InvalidCheckpoint, match=name):
        verify_files(adapter)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_one_flipped_byte_in_what_is_attached_is_refused(adapter: Path, name: str, share: float) -> None:
    flip(adapter / name, share)
    model = tiny_model("llama")
    with pytest.raises(InvalidCheckpoint, match=name):
        orthokv.attach(model, adapter)
    assert seam_of(model) is None


@pytest.mark.parametrize("line", range(5))
def test_one_flipped_byte_in_the_digests_is_found(adapter: Path, line: int) -> None:
    lines = (adapter / SUMS).read_bytes().splitlines(keepends=True)
    changed = bytearray(lines[line])
    changed[5] = ord("0") if changed[5] != ord("0") else ord("1")
    lines[line] = bytes(changed)
    (adapter / SUMS).write_bytes(b"".join(lines))
    with pytest.raises(InvalidCheckpoint):
        verify_files(adapter)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(InvalidCheckpoint, match=name):
        verify_files(adapter)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, SUMS])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(adapter: Path, name: str, share: float) -> None:
    raw = (adapter / name).read_bytes()
    (adapter / name).write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InvalidCheckpoint):
        verify_files(adapter)
    if name != SUMS:
        with pytest.raises(InvalidCheckpoint, match=name):
            read_checkpoint(adapter)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_with_the_right_digest_is_refused(adapter: Path, name: str, share: float) -> None:
    """A digest proves that a file is what was uploaded, not that it was whole."""
    raw = (adapter / name).read_bytes()
    (adapter / name).write_bytes(raw[: int(share * len(raw))])
    resealed(adapter)
    with pytest.raises(InvalidCheckpoint, match=name):
        read_checkpoint(adapter)


def test_digests_that_are_no_text_are_refused(adapter: Path) -> None:
    (adapter / SUMS).write_bytes(b"\xff\xfe\x00nonsense")
    with pytest.raises(InvalidCheckpoint, match=SUMS):
        read_checkpoint(adapter)


def test_a_file_that_the_digests_do_not_list_is_not_believed(adapter: Path) -> None:
    lines = (adapter / SUMS).read_text().splitlines(keepends=True)
    (adapter / SUMS).write_text("".join(line for line in lines if TENSORS not in line))
    with pytest.raises(InvalidCheckpoint, match=f"{TENSORS} is not listed"):
        read_checkpoint(adapter)


@pytest.mark.parametrize("what", ["missing", "empty", "file"])
def test_what_is_no_checkpoint_is_said_to_be_none(what: str, tmp_path: Path) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "file":
        path.write_text("")
    with pytest.raises(InvalidCheckpoint, match=what):
        read_checkpoint(path)


# --------------------------------------------------------------------------- sealed, and wrong all the same


def name_of(layer: int, side: str) -> str:
    return f"layers.{layer}.{side}.encoder"


def put(value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name_of(1, "value")].view(-1)[3:4].fill_(value)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put(float("nan")), r"layers\.1\.value\.encoder holds values that are not finite"),
        (put(float("inf")), r"layers\.1\.value\.encoder holds values that are not finite"),
        (put(0.9), r"layers\.1\.value\.encoder is not orthonormal"),
        (lambda t: t[name_of(0, "key")].mul_(1.01), r"layers\.0\.key\.encoder is not orthonormal"),
        (lambda t: t.pop(name_of(2, "key")), r"layers\.2\.key\.encoder has shape None"),
        (
            lambda t: t.update({name_of(2, "key"): t[name_of(2, "key")][:, :, :1]}),
            r"layers\.2\.key\.encoder has shape \(1, 32, 1\)",
        ),
        (
            lambda t: t.update({"layers.0.key.decoder": t[name_of(0, "key")][:, :, :1]}),
            "encoder and decoder of layer 0 key differ in shape",
        ),
    ],
    ids=["nan", "inf", "one entry", "scaled", "missing", "narrow", "decoder"],
)
def test_tensors_that_cannot_be_bases_are_refused_by_name(
    adapter: Path, change: Callable[[dict[str, Tensor]], object], named: str
) -> None:
    retensored(adapter, change)
    with pytest.raises(InvalidCheckpoint, match=named):
        read_checkpoint(adapter)


def test_a_checkpoint_from_before_layers_could_differ_is_read(adapter: Path) -> None:
    edited(adapter, lambda c: [entry.pop("sharing") for entry in c["ranks"]])
    assert read_checkpoint(adapter).sharing == "joint"


def test_groups_that_do_not_divide_the_heads_are_refused_as_a_fault_of_the_file(adapter: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for entry in (config, *config["ranks"]):
            entry["sharing"] = "pair"
        config["geometry"]["kv_heads"] = 3

    edited(adapter, change)
    with pytest.raises(InvalidCheckpoint, match="layer 0: sharing 'pair' makes groups of 2"):
        read_checkpoint(adapter)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(format_version=2), "format version 2 is not 1"),
        (lambda c: c.update(format_version="1"), "format version '1' is not 1"),
        (lambda c: c.pop("format_version"), "format version None is not 1"),
        (lambda c: c.pop("geometry"), "geometry"),
        (lambda c: c["geometry"].update(colour="red"), "colour"),
        (lambda c: c.update(key_mode="during"), "'during'"),
        (lambda c: c.update(sharing="none"), "'none'"),
        (lambda c: c["ranks"][1].update(sharing="auto"), "sharing of a layer 'auto'"),
        (lambda c: c["ranks"][1].update(sharing="pair"), "sharing of a layer 'pair'"),
        (
            lambda c: [c.update(sharing="auto"), c["ranks"][0].update(sharing="pair")],
            r"layer 0: key rank \d+ is outside 1\.\.16",
        ),
        (lambda c: [c.update(sharing="auto"), c["ranks"][2].pop("sharing")], "sharing of a layer 'auto'"),
        (lambda c: c.update(codec={"name": "zip"}), "'zip'"),
        (lambda c: c["ranks"].pop(), "ranks for 2 layers, its model has 3"),
        (lambda c: c["ranks"][1]["key"].update(rank=33), r"layer 1: key rank 33 is outside 1\.\.32"),
        (lambda c: c["ranks"][2]["value"].update(rank=0), r"layer 2: value rank 0 is outside 1\.\.32"),
        (lambda c: c["ranks"][0]["key"].update(rank="many"), "many"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_field(
    adapter: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    edited(adapter, change)
    with pytest.raises(InvalidCheckpoint, match=named):
        read_checkpoint(adapter)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("base_model"),
        lambda c: c["base_model"].pop("fingerprints"),
        lambda c: c["base_model"].update(fingerprints={}),
        lambda c: c.pop("cache"),
        lambda c: c["geometry"].update(kv_heads="four"),
    ],
    ids=["base_model", "fingerprints", "no fingerprint", "cache", "kv_heads"],
)
def test_a_field_that_attach_needs_is_missed_before_the_model_is_touched(
    adapter: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edited(adapter, change)
    model = tiny_model("llama")
    before = logits(model)
    try:
        with pytest.raises(InvalidCheckpoint):
            orthokv.attach(model, adapter)
    finally:
        assert seam_of(model) is None
    assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------------- attaching, detaching


def trace(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that attaching may not change for good."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [name for name, _ in model.named_modules()],
        "buffers": [name for name, _ in model.named_buffers()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()
        },
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
    }


HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_state_dict_hooks",
)


def assert_same_trace(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for part in set(before) - {"state"}:
        assert before[part] == after[part], part


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [(a, i) for a in ARCHITECTURES for i in ("sdpa", "eager") if i == "eager" or a not in EAGER_ONLY],
)
def test_detach_leaves_the_model_as_it_was(
    architecture: str, attention: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    checkpoint = make(architecture).write(tmp_path / "out")
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    before, outputs = trace(model), logits(model)
    for _ in range(2):
        assert orthokv.attach(model, checkpoint) is model
        assert list(model.state_dict()) == list(before["state"])
        assert not torch.equal(logits(model), outputs)
        model.generate(tiny_tokens(1, 5), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        assert orthokv.detach(model) is model
        assert_same_trace(before, trace(model))
        assert torch.equal(logits(model), outputs)


def test_attaching_twice_is_refused_and_the_first_stays(adapter: Path) -> None:
    model = orthokv.attach(tiny_model("llama"), adapter)
    before = logits(model)
    with pytest.raises(InvalidSetting, match="already attached"):
        orthokv.attach(model, adapter)
    assert torch.equal(logits(model), before)


def test_detaching_what_is_not_attached_is_refused(adapter: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidSetting, match="nothing is attached"):
        orthokv.detach(model)
    orthokv.detach(orthokv.attach(model, adapter))
    with pytest.raises(InvalidSetting, match="nothing is attached"):
        orthokv.detach(model)


def other_theta(model: PreTrainedModel) -> PreTrainedModel:
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    return model


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: tiny_model("llama", seed=1), "other weights"),
        (lambda: other_theta(tiny_model("llama")), "rotary parameters .*10000.*500000"),
        (lambda: tiny_model("qwen2"), "model_type 'llama', the model has 'qwen2'"),
        (lambda: tiny_model("mistral"), "model_type 'llama', the model has 'mistral'"),
        (lambda: tiny_model("opt"), "rotary"),
    ],
    ids=["weights", "rope theta", "qwen2", "mistral", "opt"],
)
def test_another_model_is_refused_and_left_alone(
    adapter: Path, model: Callable[[], PreTrainedModel], named: str
) -> None:
    foreign = model()
    before = trace(foreign)
    with pytest.raises(CheckpointMismatch, match=named):
        orthokv.attach(foreign, adapter)
    assert_same_trace(before, trace(foreign))


def test_one_changed_key_projection_is_another_model(adapter: Path) -> None:
    model = tiny_model("llama")
    model.get_parameter("model.layers.2.self_attn.k_proj.weight").data[0, 0] += 1e-3
    with pytest.raises(CheckpointMismatch, match="other weights"):
        orthokv.attach(model, adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_model_is_recognised_in_another_dtype(adapter: Path, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)  # type: ignore[arg-type]
    orthokv.attach(model, adapter)
    assert bool(logits(model).isfinite().all())


def test_a_longer_context_than_at_calibration_is_no_mismatch(adapter: Path) -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = 4096
    orthokv.attach(model, adapter)


def test_an_unknown_architecture_is_refused_by_name(adapter: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16))
    with pytest.raises(UnsupportedModel, match="'gpt2' is not supported"):
        orthokv.attach(model, adapter)


def test_a_model_without_a_language_model_head_is_refused_in_a_sentence(
    adapter: Path, make: Callable[..., Made]
) -> None:
    bare = AutoModel.from_pretrained(make().folder)
    with pytest.raises(OrthoKVError):
        orthokv.attach(bare, adapter)


def test_an_attention_that_cannot_be_wrapped_is_refused_by_name(adapter: Path) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InvalidSetting, match="'flex_attention' cannot be wrapped"):
        orthokv.attach(model, adapter)
    assert seam_of(model) is None


def test_an_unknown_codec_is_refused_before_the_model_is_touched(adapter: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidSetting, match="'2-bit'"):
        orthokv.attach(model, adapter, codec="2-bit")
    assert seam_of(model) is None


@pytest.mark.parametrize("text", ["no-such-folder", "./no/such", "not a valid/hub id!", "/nowhere/at/all"])
def test_a_checkpoint_that_does_not_exist_is_one_sentence(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidCheckpoint):
        orthokv.attach(tiny_model("llama"), text)


@pytest.mark.parametrize("key_mode", KEY_MODES)
def test_changing_the_attention_of_an_attached_model_works_or_is_refused(
    key_mode: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    checkpoint = make("llama", key_mode=key_mode).write(tmp_path / "out")
    model = orthokv.attach(tiny_model("llama"), checkpoint)
    before = logits(model)
    try:
        model.set_attn_implementation("eager")
        after = logits(model)
    except OrthoKVError:
        return
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_compressed_cache_is_refused_by_the_detached_model(
    kept: float, make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make("llama", key_mode="post", sharing="head")
    checkpoint = write_checkpoint(
        made.profile, allocate(made.profile, Budget("kept", kept)), tmp_path / "out"
    )
    model = orthokv.attach(tiny_model("llama"), checkpoint, codec="native")
    cache = DynamicCache(config=model.config)
    tokens = tiny_tokens(1, 8)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=cache, use_cache=True)
        orthokv.detach(model)
        with pytest.raises(OrthoKVError):
            model(tokens[:, 6:], past_key_values=cache, use_cache=True)


def test_an_uncompressed_cache_is_refused_by_the_attached_model(adapter: Path) -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tiny_tokens(1, 6), past_key_values=cache, use_cache=True)
        orthokv.attach(model, adapter)
        with pytest.raises(InvalidSetting, match="already holds uncompressed"):
            model(tiny_tokens(1, 1), past_key_values=cache, use_cache=True)


def test_a_forward_that_fails_leaves_nothing_in_the_seam(adapter: Path) -> None:
    model = orthokv.attach(tiny_model("llama"), adapter)
    seam = seam_of(model)
    assert seam is not None
    states = [dict(vars(seam.state(i))) for i in range(3)]
    before = logits(model)
    cache = DynamicCache(config=model.config)
    with pytest.raises(RuntimeError):  # a mask of the wrong size, found out by the attention itself
        model(torch.tensor([[5, 6]]), attention_mask=torch.zeros(1, 1, 2, 5), past_key_values=cache)
    assert [dict(vars(seam.state(i))) for i in range(3)] == states
    assert torch.equal(logits(model), before)


# --------------------------------------------------------------------------------------- in a fresh process


def fresh(code: str, *arguments: object) -> Any:
    """Run code in a new Python; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOAD = """
    import json, sys
    import torch
    {imports}
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    tokens = torch.tensor(json.loads(sys.argv[2]))
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        made = model.generate(tokens[:1, :6], max_new_tokens=12, do_sample=False)
    print(json.dumps(dict(
        logits=logits.double().tolist(), generated=made.tolist(), attached=hasattr(model, "_orthokv_seam"),
        text=tokenizer.decode(made[0]),
    )))
"""


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return tiny_tokens(2, 12, seed=4)


@torch.no_grad()
def here(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, list[list[int]]]:
    generate: Any = model.generate
    made = generate(tokens[:1, :6], max_new_tokens=12, do_sample=False)
    return model(tokens, use_cache=False).logits.double(), made.tolist()


def test_a_full_checkpoint_loads_with_one_import_in_a_fresh_process(full: Path, tokens: Tensor) -> None:
    found = fresh(LOAD.format(imports="import orthokv"), full, json.dumps(tokens.tolist()))
    expected, generated = here(orthokv.attach(tiny_model("llama"), full), tokens)
    assert found["attached"]
    assert torch.equal(torch.tensor(found["logits"], dtype=torch.float64), expected)
    assert found["generated"] == generated


def test_without_the_import_the_same_folder_is_the_uncompressed_model(full: Path, tokens: Tensor) -> None:
    found = fresh(LOAD.format(imports=""), full, json.dumps(tokens.tolist()))
    expected, generated = here(tiny_model("llama"), tokens)
    assert not found["attached"]
    assert torch.equal(torch.tensor(found["logits"], dtype=torch.float64), expected)
    assert found["generated"] == generated


@pytest.fixture
def from_full(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "full"))


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def test_a_full_checkpoint_whose_bases_were_altered_does_not_load(from_full: Path) -> None:
    flip(from_full / TENSORS, 0.9)
    with pytest.raises(InvalidCheckpoint, match=TENSORS):
        load(from_full)


def test_a_full_checkpoint_without_its_bases_does_not_load(from_full: Path) -> None:
    for name in (CONFIG, TENSORS, SUMS):
        (from_full / name).unlink()
    with pytest.raises(InvalidCheckpoint):
        load(from_full)


def test_a_full_checkpoint_with_other_weights_does_not_load(
    from_full: Path, make: Callable[..., Made]
) -> None:
    shutil.copy(make("llama", seed=1).folder / "model.safetensors", from_full)
    with pytest.raises(CheckpointMismatch, match="other weights"):
        load(from_full)


def test_a_full_checkpoint_with_another_rope_does_not_load(from_full: Path) -> None:
    config = json.loads((from_full / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (from_full / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="rotary"):
        load(from_full)


def test_a_full_checkpoint_of_a_later_format_does_not_load(from_full: Path) -> None:
    config = json.loads((from_full / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (from_full / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidCheckpoint, match="format version 2"):
        load(from_full)


def test_other_altered_weights_of_a_full_checkpoint_are_found_when_all_files_are_verified(
    from_full: Path,
) -> None:
    """Loading compares key and value projections only: hashing all weights at every load would double its time."""
    weights = load_file(from_full / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, from_full / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors"):
        verify_files(from_full)


def test_a_full_checkpoint_detached_and_saved_is_the_plain_model(full: Path, tmp_path: Path) -> None:
    model = orthokv.detach(load(full))
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(tiny_model("llama")))


def test_saving_an_attached_model_gives_a_folder_that_loads_or_is_refused(full: Path, tmp_path: Path) -> None:
    model = load(full)
    before = logits(model)
    try:
        model.save_pretrained(tmp_path / "again")
    except OrthoKVError:
        return
    assert torch.equal(logits(load(tmp_path / "again")), before)


def test_bases_are_no_part_of_the_state_dict_and_follow_the_model(adapter: Path) -> None:
    model = orthokv.attach(tiny_model("llama"), adapter)
    assert set(model.state_dict()) == set(tiny_model("llama").state_dict())
    bases = [module for name, module in model.named_modules() if name.endswith("orthokv_bases")]
    assert len(bases) == 3
    nn.Module.to(model, torch.float64)
    assert all(buffer.dtype == torch.float64 for module in bases for buffer in module.buffers())


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_measurements_that_cannot_all_be_moved_in_leave_the_checkpoint_as_it_was(
    adapter: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    moves, replace_file = [], os.replace

    def move(source: Any, target: Any) -> None:
        moves.append(target)
        if len(moves) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(StorageError, match="it is as it was"):
        record_measurements(adapter, MEASURED)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert [path for path in adapter.parent.iterdir() if path.name.startswith(".measured")] == []
    verify_files(adapter)
