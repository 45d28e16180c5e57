"""The command line does what it says; bad input is one line on standard error, a code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthokv import __version__
from orthokv.checkpoint.read import read_checkpoint
from orthokv.cli import main
from orthokv.files.digests import verify_files
from orthokv.planning.profile import PROFILE_JSON, PROFILE_TENSORS, ErrorProfile
from orthokv.spec.names import CONFIG, TENSORS
from tests.support.paths import DEMO
from tests.support.tiny import tiny_folder, tiny_text

SMALL = ("--num-samples", "4", "--sequence-length", "64")


@dataclass(frozen=True)
class Said:
    """What a command printed, and the code it ended with."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return Said(int(ended.value.code or 0), found.out, found.err)

    return command


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English enough for the demo model, long enough for the tiny ones."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    sentence = "Once upon a time there was a small cache that wanted to remember everything it had read. "
    path.write_text("".join(json.dumps({"text": f"{i}. {sentence * 4}"}) + "\n" for i in range(20)))
    return path


def in_a_new_process(*arguments: object, limit: int | None = None) -> Said:
    """A command in a Python of its own; with `limit` no file may grow beyond that many bytes."""
    code = """
        import resource, signal, sys
        if (limit := int(sys.argv.pop(1))):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        from orthokv.cli import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(limit or 0), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )
    return Said(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Compressed:
    folder: Path
    said: Said


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Compressed:
    """The demo model, compressed once by the command itself in a process of its own."""
    out = tmp_path_factory.mktemp("demo") / "checkpoint"
    said = in_a_new_process(
        "compress",
        DEMO,
        "--dataset",
        text,
        "--kept",
        "0.5",
        "--steps",
        "2",
        *SMALL,
        "--out",
        out,
        "--device",
        "cpu",
    )
    assert said.code == 0, said.err
    return Compressed(out, said)


@pytest.fixture
def copied(compressed: Compressed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compressed.folder, tmp_path / "copied"))


def refused(said: Said, out: Path, *named: str, code: int = 2) -> None:
    """One sentence that names what is wrong, the right code, and nothing on disk."""
    assert said.code == code, said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("orthokv: ")
    for word in named:
        assert word in said.err
    assert not out.exists()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")] == []


# ------------------------------------------------------------------------------------- each command, end to end


def test_compress_writes_a_sound_checkpoint_and_says_what_it_measured(compressed: Compressed) -> None:
    verify_files(compressed.folder)
    config = read_checkpoint(compressed.folder).config
    assert config["measured"]["kept"] <= 0.5
    assert config["method"]["name"] == "oblique"
    assert config["method"]["steps"] == 2
    assert config["sharing"] == "joint"
    assert config["key_mode"] == "pre"
    assert "perplexity" in compressed.said.out
    assert str(compressed.folder) in compressed.said.out
    assert "fitting: 6/6 layers" in compressed.said.err
    assert {path.name for path in compressed.folder.parent.iterdir()} == {"checkpoint"}


def test_compress_with_self_needs_no_text_and_prints_one_json_object(run: Run, tmp_path: Path) -> None:
    said = run(
        "compress", DEMO, "--dataset", "self", "--kept", "0.25", "--method", "eigen", "--sharing", "tied",
        "--num-samples", 2, "--sequence-length", 16, "--form", "full", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["plan"]["kept"] <= 0.25
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert found["measured"]["kept"] == pytest.approx(found["plan"]["kept"])


NUMBERS = (
    "perplexity",
    "perplexity_dense",
    "kl",
    "kept",
    "cache_bytes_per_token",
    "cache_bytes_per_token_dense",
)


def test_evaluate_prints_exactly_one_json_object(run: Run, compressed: Compressed, text: Path) -> None:
    said = run(
        "evaluate",
        compressed.folder,
        "--dataset",
        text,
        "--num-samples",
        2,
        "--sequence-length",
        64,
        "--json",
    )
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert all(isinstance(found[name], int | float) for name in NUMBERS)
    assert found["tokens"] == 2 * 63
    assert found["kept"] == found["cache_bytes_per_token"] / found["cache_bytes_per_token_dense"] <= 0.5
    assert (
        found["cache_bytes_per_token"]
        == read_checkpoint(compressed.folder).config["cache"]["bytes_per_token"]
    )
    assert found["cache_bytes_per_token_dense"] == 6 * 2 * 2 * 64 * 2
    assert found["kl"] >= 0
    assert found["tokens_per_second"] > 0


def test_evaluate_in_words(run: Run, compressed: Compressed, text: Path) -> None:
    said = run(
        "evaluate",
        compressed.folder,
        "--model",
        DEMO,
        "--dataset",
        text,
        "--num-samples",
        1,
        "--sequence-length",
        32,
    )
    assert said.code == 0, said.err
    assert "perplexity" in said.out
    assert "kept" in said.out


def test_the_far_end_of_the_context_is_calibrated_and_measured(run: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "post"
    said = run(
        "compress", DEMO, "--dataset", text, "--kept", "0.5", "--method", "eigen", *SMALL, "--out", out,
        "--key-mode", "post", "--positions", "512",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert read_checkpoint(out).config["calibrated_positions"] == 512
    evaluate = ("evaluate", out, "--dataset", text, "--num-samples", 1, "--sequence-length", 32)
    said = run(*evaluate, "--start-position", 480)
    assert said.code == 0, said.err
    assert "measured on blocks that begin at position 480" in said.out
    assert json.loads(run(*evaluate, "--start-position", 480, "--json").out)["dataset"]["starts"] == [480]
    refused(run(*evaluate, "--start-position", 993), tmp_path / "none", "1025", "1024")


def test_plan_makes_another_checkpoint_without_a_model(
    run: Run, compressed: Compressed, tmp_path: Path
) -> None:
    said = run("plan", compressed.folder, "--kept", "0.25", "--out", tmp_path / "out")
    assert said.code == 0, said.err
    found = read_checkpoint(tmp_path / "out")
    assert found.config["cache"]["kept"] <= 0.25
    assert found.config["measured"] is None
    assert "not measured" in said.out
    verify_files(tmp_path / "out")


@pytest.mark.parametrize("allocation", ["knapsack", "greedy", "pareto"])
def test_plan_full_holds_the_model_too(
    allocation: str, run: Run, compressed: Compressed, tmp_path: Path
) -> None:
    said = run(
        "plan", compressed.folder, "--kept", "0.4", "--form", "full", "--allocation", allocation, "--out", tmp_path / "out"
    )  # fmt: skip
    assert said.code == 0, said.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (DEMO / "model.safetensors").read_bytes()
    assert read_checkpoint(tmp_path / "out").config["plan"]["allocation"] == allocation


@pytest.mark.parametrize(
    ("options", "allowed"),
    [(("--rank-multiple", 16), range(16, 1000, 16)), (("--rank-choices", "32,48,128"), (32, 48, 128))],
)
def test_plan_uses_the_ranks_that_were_asked_for(
    options: tuple[object, ...], allowed: Sequence[int], run: Run, compressed: Compressed, tmp_path: Path
) -> None:
    said = run("plan", compressed.folder, "--kept", "0.4", *options, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    plan = read_checkpoint(tmp_path / "out").config["plan"]
    assert all(rank in allowed for pair in plan["ranks"] for rank in pair.values())
    assert plan["kept"] <= 0.4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rank-multiple", 0), "rank multiple must be at least 1, not 0"),
        (("--rank-multiple", 999), "multiple of 999"),
        (("--rank-choices", "16,many"), "--rank-choices '16,many'"),
        (("--rank-choices", "9999"), "no rank of 9999"),
    ],
)
def test_plan_refuses_ranks_that_cannot_be(
    options: tuple[object, ...], named: str, run: Run, compressed: Compressed, tmp_path: Path
) -> None:
    said = run("plan", compressed.folder, "--kept", "0.4", *options, "--out", tmp_path / "out")
    refused(said, tmp_path / "out", named)


def test_compress_refuses_ranks_that_cannot_be_before_it_reads_any_weight(
    run: Run, text: Path, tmp_path: Path
) -> None:
    said = run(
        "compress", DEMO, "--dataset", text, "--kept", "0.5", "--rank-multiple", 999, *SMALL, "--out", tmp_path / "out"
    )  # fmt: skip
    refused(said, tmp_path / "out", "multiple of 999")
    assert "fitting" not in said.err


def test_compress_with_compressed_inputs_says_so_in_its_checkpoint(
    run: Run, text: Path, tmp_path: Path
) -> None:
    said = run(
        "compress", DEMO, "--dataset", text, "--kept", "0.5", "--method", "eigen", "--propagate", "0.25", "--rank-multiple",
        16, *SMALL, "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert said.code == 0, said.err
    config = read_checkpoint(tmp_path / "out").config
    assert config["method"]["propagate"] == 0.25
    assert all(rank % 16 == 0 for pair in config["plan"]["ranks"] for rank in pair.values())


def test_generate_continues_a_prompt_from_the_compressed_cache(run: Run, compressed: Compressed) -> None:
    said = run("generate", compressed.folder, "--prompt", "Once upon a time", "--max-new-tokens", 5)
    assert said.code == 0, said.err
    assert said.out.startswith("Once upon a time")
    assert "cache: " in said.err
    again = run(
        "generate", compressed.folder, "--prompt", "Once upon a time", "--max-new-tokens", 5, "--json"
    )
    found = json.loads(again.out)
    assert found["text"].strip() == said.out.strip()
    assert found["tokens"] == 5
    assert found["kept"] == pytest.approx(read_checkpoint(compressed.folder).config["cache"]["kept"])


def test_inspect_verifies_and_describes(run: Run, compressed: Compressed, tmp_path: Path) -> None:
    said = run("inspect", compressed.folder, "--plot", tmp_path / "profile.png")
    assert said.code == 0, said.err
    assert "sound" in said.out
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads(run("inspect", compressed.folder, "--json").out)
        == read_checkpoint(compressed.folder).config
    )


def test_inspect_shows_a_bare_profile(run: Run, compressed: Compressed, tmp_path: Path) -> None:
    for name in (PROFILE_JSON, PROFILE_TENSORS):
        shutil.copy(compressed.folder / name, tmp_path)
    assert run("inspect", tmp_path).code == 0
    found = json.loads(run("inspect", tmp_path, "--json").out)
    assert found == ErrorProfile.load(tmp_path).to_dict()


def test_compare_measures_every_method_at_every_share(run: Run, text: Path, tmp_path: Path) -> None:
    said = run(
        "compare", DEMO, "--dataset", text, "--eval", text, "--kept", "0.5,0.25", "--methods", "eigen:tied,stiefel:joint",
        "--steps", 1, "--eval-samples", 1, "--num-samples", 2, "--sequence-length", 32, "--json",
        "--plot", tmp_path / "plot.png",
    )  # fmt: skip
    assert said.code == 0, said.err
    rows = json.loads(said.out)["rows"]
    assert [(row["method"], row["sharing"], row["kept_asked"]) for row in rows] == [
        ("eigen", "tied", 0.5),
        ("eigen", "tied", 0.25),
        ("stiefel", "joint", 0.5),
        ("stiefel", "joint", 0.25),
    ]
    assert all(row["kept"] <= row["kept_asked"] for row in rows)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["compress", "evaluate", "compare", "plan", "generate", "inspect"])
def test_every_command_has_help(command: str, run: Run) -> None:
    said = run(command, "--help")
    assert said.code == 0
    assert "Usage" in said.out


# ------------------------------------------------------------------------------------------ models not taken


def compress(run: Run, model: Path | str, text: Path | str, out: Path, *options: object) -> Said:
    return run(
        "compress",
        model,
        "--dataset",
        text,
        *(options or ("--kept", "0.5")),
        "--method",
        "eigen",
        *SMALL,
        "--out",
        out,
    )


def test_an_unknown_architecture_is_refused_by_name(run: Run, text: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        compress(run, folder, text, tmp_path / "out"), tmp_path / "out", "'gpt2' is not supported", "llama"
    )


def test_a_model_of_pickles_only_is_refused(run: Run, text: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(compress(run, folder, text, tmp_path / "out"), tmp_path / "out", "pickles", "pytorch_model.bin")


def test_a_missing_tokenizer_is_refused(run: Run, text: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(compress(run, folder, text, tmp_path / "out"), tmp_path / "out", "no tokenizer")


def test_a_model_with_code_is_refused(run: Run, text: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(compress(run, folder, text, tmp_path / "out"), tmp_path / "out", "'auto_map'", "config.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_layer_and_tensor(
    value: float, run: Run, text: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        compress(run, folder, text, tmp_path / "out"),
        tmp_path / "out",
        "model.layers.1.self_attn.v_proj.weight",
        "not finite",
    )


def test_a_truncated_model_is_refused_by_file(run: Run, text: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])
    refused(compress(run, folder, text, tmp_path / "out"), tmp_path / "out", "model.safetensors", "truncated")


def test_a_model_that_does_not_exist_is_refused(run: Run, text: Path, tmp_path: Path) -> None:
    said = compress(run, tmp_path / "nowhere", text, tmp_path / "out")
    refused(said, tmp_path / "out", "nowhere", "does not exist")


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_every_supported_architecture_is_taken_from_its_own_files(
    architecture: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(tiny_text(400))
    said = compress(run, tiny_folder(tmp_path, architecture), tmp_path / "text.txt", tmp_path / "out")
    assert said.code == 0, said.err
    verify_files(tmp_path / "out")


# ------------------------------------------------------------------------------------------- budgets, settings


@pytest.mark.parametrize("kept", ["0", "-0.1", "1.01", "25", "nan", "inf"])
def test_kept_outside_0_to_1_is_refused_before_any_work(kept: str, run: Run, tmp_path: Path) -> None:
    said = compress(run, tmp_path / "unread", "unread.txt", tmp_path / "out", "--kept", kept)
    refused(said, tmp_path / "out", "kept must be above 0 and at most 1")


@pytest.mark.parametrize(
    "options", [("--kept", 0.5, "--layer-error", 0.1), ("--seed", 1)], ids=["two", "none"]
)
def test_one_budget_is_wanted(options: tuple[object, ...], run: Run, tmp_path: Path) -> None:
    said = compress(run, tmp_path / "unread", "unread.txt", tmp_path / "out", *options)
    refused(said, tmp_path / "out", "exactly one budget")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--sharing", "none"),
        ("--key-mode", "during"),
        ("--form", "half"),
        ("--num-samples", "1"),
        ("--steps", "3"),
        ("--positions", "64"),
        ("--device", "quantum"),
        ("--polish-steps", "-1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_value(
    option: str, value: str, run: Run, text: Path, tmp_path: Path
) -> None:
    said = run(
        "compress", DEMO, "--dataset", text, "--kept", "0.5", "--method", "eigen", *SMALL, "--out", tmp_path / "out",
        option, value,
    )  # fmt: skip
    refused(said, tmp_path / "out", "steps" if option == "--steps" else value)


def test_an_out_folder_that_is_taken_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    said = compress(run, tmp_path / "unread", "unread.txt", tmp_path / "out")
    assert said.code == 2
    assert said.err == f"orthokv: {tmp_path / 'out'} exists and is not an empty folder\n"
    assert (tmp_path / "out" / "precious").read_text() == "keep"


def test_a_share_that_cannot_be_reached_ends_with_3_and_the_best(
    run: Run, text: Path, tmp_path: Path
) -> None:
    said = compress(run, DEMO, text, tmp_path / "deep" / "out", "--kept", "0.0001")
    assert said.code == 3
    assert said.last.startswith("orthokv: kept 0.0001 cannot be met")
    assert "0.0" in said.last.split("keep ")[-1]
    assert not (tmp_path / "deep").exists()


def test_a_perplexity_that_cannot_be_reached_ends_with_3_and_the_best(
    run: Run, text: Path, tmp_path: Path
) -> None:
    said = compress(run, DEMO, text, tmp_path / "out", "--perplexity-increase", "1e-12")
    if said.code == 0:  # compression may help by chance; then the increase is truly below
        assert read_checkpoint(tmp_path / "out").config["plan"]["budget"]["metric"] == "perplexity_increase"
        return
    assert said.code == 3
    assert "reaches" in said.last
    assert not (tmp_path / "out").exists()


def test_plan_says_the_best_too(run: Run, compressed: Compressed, tmp_path: Path) -> None:
    said = run("plan", compressed.folder, "--kept", "0.0001", "--out", tmp_path / "out")
    refused(said, tmp_path / "out", "kept 0.0001 cannot be met", code=3)


# -------------------------------------------------------------------------------------------------- text


def test_a_data_set_of_one_token_is_refused_with_what_is_needed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    said = compress(run, DEMO, tmp_path / "one.txt", tmp_path / "out")
    refused(said, tmp_path / "out", "one.txt holds 1 token; 4 x 64 = 256 are needed")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("latin.txt", b"caf\xe9 " * 500, "not valid UTF-8 at byte 3"),
        ("field.jsonl", b'{"content": "x"}\n', "row 1"),
        ("broken.jsonl", b'{"text": "x"}\n{"text":\n', "row 2"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_its_row(
    name: str, content: bytes, named: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(compress(run, DEMO, tmp_path / name, tmp_path / "out"), tmp_path / "out", named)


def test_blocks_longer_than_the_model_are_refused(run: Run, text: Path, tmp_path: Path) -> None:
    said = run(
        "compress",
        DEMO,
        "--dataset",
        text,
        "--kept",
        "0.5",
        "--sequence-length",
        1025,
        "--out",
        tmp_path / "out",
    )
    refused(said, tmp_path / "out", "1025 exceeds the model's 1024")


# ---------------------------------------------------------------------------------------------- checkpoints


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x04
    path.write_bytes(raw)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect"])
def test_an_altered_checkpoint_is_refused_by_every_command(
    command: str, name: str, run: Run, copied: Path, text: Path, tmp_path: Path
) -> None:
    flip(copied / name)
    options = {"evaluate": ("--dataset", text), "generate": ("--prompt", "x"), "inspect": ()}[command]
    refused(run(command, copied, *options), tmp_path / "out", name, "altered or truncated")


@pytest.mark.parametrize("name", [PROFILE_JSON, PROFILE_TENSORS, "README.md"])
def test_inspect_finds_what_the_other_commands_do_not_read(
    name: str, run: Run, copied: Path, tmp_path: Path
) -> None:
    flip(copied / name)
    refused(run("inspect", copied), tmp_path / "out", name, "altered or truncated")


@pytest.mark.parametrize("what", ["error", "basis"])
def test_plan_refuses_the_altered_profile_of_a_checkpoint(
    what: str, run: Run, copied: Path, tmp_path: Path
) -> None:
    path = copied / PROFILE_TENSORS
    tensors = load_file(path)
    if what == "error":
        tensors["layers.0.error"].mul_(0.01)
    else:
        tensors["layers.0.key.encoder"][0, 0, 0] += 5e-5  # below what orthonormality alone would show
    save_file(tensors, path)
    refused(
        run("plan", copied, "--kept", "0.3", "--out", tmp_path / "out"), tmp_path / "out", PROFILE_TENSORS
    )


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect", "plan"])
def test_a_folder_without_a_checkpoint_is_refused(command: str, run: Run, text: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    options: dict[str, tuple[object, ...]] = {
        "evaluate": ("--dataset", text),
        "generate": ("--prompt", "x"),
        "inspect": (),
        "plan": ("--kept", "0.5", "--out", tmp_path / "out"),
    }
    refused(run(command, tmp_path / "nothing", *options[command]), tmp_path / "out", "nothing")


def test_a_checkpoint_on_another_model_is_refused(
    run: Run, compressed: Compressed, text: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "other"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = run(
        "evaluate",
        compressed.folder,
        "--model",
        folder,
        "--dataset",
        text,
        "--num-samples",
        1,
        "--sequence-length",
        16,
    )
    refused(said, tmp_path / "out", "other weights")


def test_a_checkpoint_under_another_rope_is_refused(
    run: Run, compressed: Compressed, text: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (folder / "config.json").write_text(json.dumps(config))
    said = run(
        "evaluate",
        compressed.folder,
        "--model",
        folder,
        "--dataset",
        text,
        "--num-samples",
        1,
        "--sequence-length",
        16,
    )
    refused(said, tmp_path / "out", "rotary parameters", "20000")


def test_plan_full_with_another_model_is_refused(run: Run, compressed: Compressed, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path, "llama")
    said = run(
        "plan",
        compressed.folder,
        "--kept",
        "0.5",
        "--form",
        "full",
        "--model",
        other,
        "--out",
        tmp_path / "out",
    )
    refused(said, tmp_path / "out")


def test_compare_on_the_models_own_text_asks_for_a_text_to_evaluate_on(run: Run, tmp_path: Path) -> None:
    said = run(
        "compare", DEMO, "--dataset", "self", "--kept", "0.5", "--methods", "eigen:tied",
        "--num-samples", 2, "--sequence-length", 8,
    )  # fmt: skip
    refused(said, tmp_path / "out", "--eval")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--kept", "0.5,2", "kept must be above 0 and at most 1, not 2"),
        ("--kept", "half", "'half'"),
        ("--methods", "eigen", "'eigen' is not method:sharing"),
        ("--methods", "pca:tied", "'pca'"),
        ("--allocation", "threshold", "'threshold'"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(
    option: str, value: str, named: str, run: Run, text: Path, tmp_path: Path
) -> None:
    options = {"--kept": "0.5", "--methods": "eigen:tied", option: value}
    said = run(
        "compare", DEMO, "--dataset", text, "--eval", text, *(x for pair in options.items() for x in pair), "--num-samples", 2,
        "--sequence-length", 8, "--eval-samples", 1,
    )  # fmt: skip
    refused(said, tmp_path / "out", named)


@pytest.mark.parametrize("prompt", ["", "x"])
def test_a_generation_of_nothing_is_refused(
    prompt: str, run: Run, compressed: Compressed, tmp_path: Path
) -> None:
    said = run("generate", compressed.folder, "--prompt", prompt, "--max-new-tokens", 0 if prompt else 4)
    refused(said, tmp_path / "out", "max_new_tokens" if prompt else "no tokens")


# ----------------------------------------------------------------------------------------- a disk that is full


def test_a_full_disk_ends_with_2_and_leaves_nothing(compressed: Compressed, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    said = in_a_new_process("plan", compressed.folder, "--kept", "0.25", "--out", disk / "out", limit=100_000)
    assert said.code == 2, said.err
    assert said.last.startswith("orthokv: cannot write")
    assert len(said.err.splitlines()) == 1
    assert list(disk.iterdir()) == []


def test_a_checkpoint_made_from_a_relative_path_is_usable_from_another_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(tiny_text(400))
    tiny_folder(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    assert compress(run, "tiny-llama-0", "text.txt", tmp_path / "out").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = run("generate", tmp_path / "out", "--prompt", "abc", "--max-new-tokens", 2)
    assert said.code == 0, said.err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"orthokv {__version__}\n"
