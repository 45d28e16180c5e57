"""Text becomes blocks exactly as documented, and every bad input is refused by name."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orthokv.spec.errors import InvalidDataset, InvalidModel, InvalidSetting, StorageError
from orthokv.text import packing, readers
from orthokv.text.blocks import Blocks, evenly
from orthokv.text.packing import load_blocks, pack
from orthokv.text.readers import read_texts
from orthokv.text.source import TextMixture, TextSource
from orthokv.text.written import draw, self_text
from tests.support.hub import Hub, Repo, serve_hub
from tests.support.paths import DEMO

TEXTS = ["The quick brown fox.", "Ängström — naïve façade ☕\nsecond line", "x" * 300]


class Letters:
    """A tokenizer that gives every character its code point: what a test can compute in its head."""

    def __init__(self, bos: int | None = None, eos: int | None = None) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos
        self.pieces: list[str] = []

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        self.pieces.append(text)
        return {"input_ids": [ord(character) for character in text]}


def write(path: Path, texts: list[str], field: str = "text") -> Path:
    rows = [{"id": index, field: text} for index, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson", ".parquet"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_rows_come_back_in_order(tmp_path: Path, suffix: str, field: str) -> None:
    path = write(tmp_path / f"rows{suffix}", TEXTS, field)
    assert list(read_texts(TextSource(str(path), field=field))) == TEXTS


def test_empty_texts_and_blank_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": ""}\n  \n{"text": "b"}')
    assert list(read_texts(TextSource(str(path)))) == ["a", "b"]


@pytest.mark.parametrize("piece", ["word ", "a paragraph.\n\n", "line\n", "ungebrochen", "☕é🎉"])
def test_plain_text_comes_whole_in_bounded_chunks(
    tmp_path: Path, piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 101)  # odd, so that characters are split between reads
    text = piece * 200
    path = tmp_path / "book.md"
    path.write_text(text, encoding="utf-8")
    chunks = list(read_texts(TextSource(str(path))))
    assert "".join(chunks) == text
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= 101
    if piece == "word ":
        assert all(chunk.endswith("word") for chunk in chunks[:-1])
    if piece == "line\n":
        assert all(chunk.endswith("line\n") for chunk in chunks)


def test_chunks_give_the_tokens_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 64)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = "".join(f"It was night {n},\n\n \n   and   nobody\tcame\n to the\ncastle. " for n in range(60))
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = load_blocks(TextSource(str(path)), tokenizer, num_samples=len(whole) // 50, sequence_length=50)
    assert blocks.tokens.flatten().tolist() == whole[: len(whole) // 50 * 50]


def test_format_overrides_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["a"]).rename(tmp_path / "rows.data")
    assert list(read_texts(TextSource(str(path), format="jsonl"))) == ["a"]
    with pytest.raises(InvalidDataset, match=r"suffix of .*rows.data tells no format"):
        read_texts(TextSource(str(path)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", "hub"),
        ("owner/name-v1.5", "hub"),
        ("wikitext", "hub"),
        ("self", "self"),
        ("missing/rows.jsonl", "jsonl"),
        ("missing.PARQUET", "parquet"),
    ],
)
def test_format_of_a_name(name: str, expected: str) -> None:
    assert TextSource(name).resolved_format() == expected


BAD_ROWS = {
    "not an object": (b'{"text": "a"}\n["b"]\n', "row 2 of .* is a list, not an object"),
    "wrong field": (
        b'{"body": "a", "id": 1}',
        "row 1 of .* has no field 'text'; its fields are 'body', 'id'",
    ),
    "no field": (b"{}", "its fields are none"),
    "number": (b'{"text": "a"}\n\n{"text": 7}', "field 'text' in row 3 of .* is a int, not a string"),
    "null": (b'{"text": null}', "is a NoneType, not a string"),
    "broken": (b'{"text": "a"}\n{"text": ', "row 2 of .* is not valid JSON"),
    "deep": (b"[" * 200_000, "row 1 of .* is not valid JSON"),
    "UTF-8": (b'{"text": "a"}\n{"text": "\xff"}', "row 2 of .* is not valid UTF-8 at its byte 10"),
    "surrogate": (b'{"text": "ab\\ud800"}', "row 1 of .* half of a surrogate pair at character 2"),
    "no text": (b'{"text": ""}\n', "holds no text"),
    "blank": (b"\n\n", "holds no text"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidDataset, match=message):
        list(read_texts(TextSource(str(path))))


def test_endless_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 20)
    path = write(tmp_path / "rows.jsonl", ["x" * 30])
    with pytest.raises(InvalidDataset, match=r"row 1 of .* is longer than 20 bytes"):
        list(read_texts(TextSource(str(path))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 70_000 + b"\xff", "not valid UTF-8 at byte 70000"),
        (b"a" * 65_535 + b"\xc3(", "not valid UTF-8 at byte 65535"),
        ("é".encode() * 5 + b"\xe2\x98", "not valid UTF-8 at byte 10"),
        (b" \n\n ", "holds no text"),
        (b"", "is empty"),
    ],
    ids=["middle", "between reads", "cut off", "blank", "empty"],
)
def test_bad_plain_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidDataset, match=message):
        list(read_texts(TextSource(str(path))))


def test_parquet_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_CHUNK_BYTES", 1_000_000)
    path = tmp_path / "bomb.parquet"
    column = pyarrow.table({"text": ["a" * 400_000, "b" * 400_000, "c" * 400_000], "other": ["x"] * 3})
    pyarrow.parquet.write_table(column, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 10_000
    message = r"row group 1 of .* unpacks to 12\d+ bytes of 'text'; at most 1000000 are read at once"
    with pytest.raises(InvalidDataset, match=message):
        next(read_texts(TextSource(str(path))))
    assert list(read_texts(TextSource(str(path), field="other"))) == ["x"] * 3


def test_a_value_that_many_rows_share_is_unpacked_once(tmp_path: Path) -> None:
    path = tmp_path / "shared.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 400_000] * 2_000}), path)
    before = pyarrow.default_memory_pool().max_memory()
    texts = read_texts(TextSource(str(path)))
    assert sum(1 for _ in zip(range(640), texts, strict=False)) == 640
    assert pyarrow.default_memory_pool().max_memory() - before < 64 * 400_000 / 4


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    def read(path: Path) -> list[str]:
        return list(read_texts(TextSource(str(path))))

    with pytest.raises(InvalidDataset, match=r"row 1 of .* has no field 'text'; its fields are 'id', 'body'"):
        read(write(tmp_path / "field.parquet", ["a"], "body"))
    for name, column, message in [
        ("int", pyarrow.array([1, 2]), "field 'text' in row 1 of .* is a int, not a string"),
        ("null", pyarrow.array(["a", None]), "field 'text' in row 2 of .* is a NoneType, not a string"),
        ("none", pyarrow.array([], pyarrow.string()), "holds no text"),
    ]:
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(InvalidDataset, match=message):
            read(path)
    invalid = pyarrow.array([b"fine", b"ab\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "utf8.parquet")
    with pytest.raises(InvalidDataset, match=r"row 2 of .* is not valid UTF-8 at its byte 2"):
        read(tmp_path / "utf8.parquet")
    sound = write(tmp_path / "cut.parquet", TEXTS)
    sound.write_bytes(sound.read_bytes()[:-9])
    with pytest.raises(InvalidDataset, match="is not sound Parquet"):
        read(sound)


@pytest.mark.parametrize("suffix", ["", ".jsonl", ".txt", ".parquet"])
def test_folder_and_missing_file_are_refused(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(InvalidDataset, match="is a folder: name one file in it"):
        read_texts(TextSource(str(folder)))
    with pytest.raises(InvalidDataset, match=r"missing.* does not exist"):
        read_texts(TextSource(str(tmp_path / f"missing{suffix}")))


def test_parquet_and_hub_name_the_extra_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.parquet", ["a"])
    for module in ("pyarrow.parquet", "datasets", "datasets.packaged_modules"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in (TextSource(str(path)), TextSource("owner/name")):
        with pytest.raises(InvalidDataset, match=r"needs pip install 'orthokv\[datasets\]'"):
            list(read_texts(source))


def test_unknown_format_and_self_are_settings_at_fault() -> None:
    with pytest.raises(InvalidSetting, match=r"format must be one of jsonl, .*, not 'csv'"):
        TextSource("rows.csv", format="csv")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="'self'"):
        read_texts(TextSource("self"))


# Hub data sets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub(monkeypatch, tmp_path / "cache") as server:
        yield server


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_hub_rows_are_streamed(hub: Hub) -> None:
    files = {"data/train.jsonl": jsonl("a", "b"), "data/test.jsonl": jsonl("c"), "name.pkl": b"pickle"}
    hub.repos["datasets/owner/name"] = Repo(files)
    assert list(read_texts(TextSource("owner/name"))) == ["a", "b"]
    assert list(read_texts(TextSource("owner/name", split="test"))) == ["c"]
    assert not hub.asked_for(".pkl")


CARD = (
    b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: PATH/secret.txt}\n---\n"
)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (None, {}, "owner/name is neither a file nor a hub data set that can be read: .*doesn't exist"),
        ({"train.jsonl": jsonl("a")}, {"field": "body"}, "row 1 of owner/name has no field 'body'"),
        ({"train.jsonl": jsonl("a")}, {"split": "valid"}, r"Bad split: valid. Available splits: \['train'\]"),
        ({"train.tar": b"tar"}, {}, "needs the builder 'webdataset'; allowed are json, parquet"),
        ({"train.pkl": b"pickle"}, {}, r"No \(supported\) data files"),
        ({"README.md": CARD}, {}, "Data files don't belong to owner/name"),
    ],
    ids=["missing", "field", "split", "builder", "pickle", "foreign file"],
)
def test_bad_hub_data_set_is_refused(
    hub: Hub, tmp_path: Path, files: dict[str, bytes] | None, options: dict[str, str], message: str
) -> None:
    (tmp_path / "secret.txt").write_text("a secret of this machine")
    if files is not None:
        here = str(tmp_path).encode()
        hub.repos["datasets/owner/name"] = Repo({n: data.replace(b"PATH", here) for n, data in files.items()})
    with pytest.raises(InvalidDataset, match=message):
        list(read_texts(TextSource("owner/name", **options)))  # type: ignore[arg-type]


def test_unreachable_hub_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InvalidDataset, match=r"owner/name is neither a file nor .*Couldn't reach .*\Z"
    ) as caught:
        list(read_texts(TextSource("owner/name")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["json", "parquet", "a/b/c", "../up"])
def test_names_that_are_no_hub_ids_are_refused(name: str) -> None:
    with pytest.raises(InvalidDataset, match="is not the id of a hub data set"):
        list(read_texts(TextSource(name, format="hub")))


# Packing


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=8),
    length=st.integers(2, 9),
    samples=st.integers(1, 6),
    marks=st.sampled_from([(None, None), (1, None), (None, 2), (1, 2)]),
    separate=st.booleans(),
)
def test_blocks_are_a_prefix_of_the_token_stream(
    texts: list[str], length: int, samples: int, marks: tuple[int | None, int | None], separate: bool
) -> None:
    mark = next((mark for mark in marks if mark is not None), None)
    stream: list[int] = []
    for index, text in enumerate(texts):
        if index and separate and mark is not None:
            stream.append(mark)
        stream += map(ord, text)
    options: dict[str, Any] = {"num_samples": samples, "sequence_length": length, "separate": separate}
    if len(stream) < samples * length:
        with pytest.raises(
            InvalidDataset, match=f"holds {len(stream)} token.*= {samples * length} are needed"
        ):
            pack(texts, Letters(*marks), **options)  # type: ignore[arg-type]
    else:
        blocks = pack(texts, Letters(*marks), **options)  # type: ignore[arg-type]
        assert blocks.tokens.shape == (samples, length)
        assert blocks.tokens.dtype == torch.int64
        assert blocks.tokens.flatten().tolist() == stream[: samples * length]


tensors = st.integers(1, 4).flatmap(
    lambda length: st.lists(
        st.lists(st.integers(0, 9), min_size=length, max_size=length), min_size=1, max_size=4
    )
)


@settings(max_examples=200, deadline=None)
@given(first=tensors, second=tensors)
def test_digest_changes_if_and_only_if_tokens_change(first: list[list[int]], second: list[list[int]]) -> None:
    one, other = Blocks.of(torch.tensor(first), "one"), Blocks.of(torch.tensor(second), "other")
    assert (one.digest == other.digest) == (first == second)


def test_digest_is_the_documented_one() -> None:
    content = b"".join(number.to_bytes(8, "little") for number in (2, 3, 10, 11, 12, 13, 14, 15))
    expected = hashlib.sha256(content).hexdigest()
    tokens = torch.arange(20, 32).view(2, 6)[:, ::2] // 2  # not contiguous in memory
    assert Blocks.of(tokens, "").digest == expected


def test_reading_stops_when_there_is_enough() -> None:
    seen = []

    def texts() -> Iterator[str]:
        for index in range(1_000_000):
            seen.append(index)
            yield "abcd"

    pack(texts(), Letters(), num_samples=3, sequence_length=4)  # type: ignore[arg-type]
    assert seen == [0, 1, 2]


def test_one_long_text_is_tokenised_in_pieces_and_no_further_than_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 10)
    letters = Letters(bos=1)
    blocks = pack(["abcdefg hij klm " * 1000], letters, num_samples=2, sequence_length=16)  # type: ignore[arg-type]
    assert "".join(map(chr, blocks.tokens.flatten())) == "abcdefg hij klm " * 2
    assert letters.pieces[:3] == ["abcdefg", " hij klm", " abcdefg"]
    assert len(letters.pieces) <= 6


def test_blocks_are_spread_over_more_text_than_is_needed_but_not_over_all_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chr(97 + i % 26) * 4 for i in range(1000)])
    letters = Letters()
    blocks = load_blocks(TextSource(str(path)), letters, num_samples=3, sequence_length=4)  # type: ignore[arg-type]
    read = packing.SPREAD * 3
    assert len(letters.pieces) == read
    picked = [chr(97 + i % 26) * 4 for i in evenly(read, 3)]
    assert ["".join(map(chr, row)) for row in blocks.tokens] == picked


def test_a_mixture_has_equal_parts_and_refuses_what_it_cannot_share() -> None:
    texts = tuple(TextSource(name) for name in ("a.txt", "b.txt", "self"))
    assert TextMixture(texts).shares(8) == [3, 3, 2]
    assert TextMixture(texts).source == "a.txt + b.txt + self"
    with pytest.raises(InvalidSetting, match="2 samples cannot be shared among 3 texts"):
        TextMixture(texts).shares(2)
    with pytest.raises(InvalidSetting, match="the mixture names self twice"):
        TextMixture((*texts, TextSource("self")))
    with pytest.raises(InvalidSetting, match="a mixture needs at least 2 texts, not 1"):
        TextMixture(texts[:1])


def test_too_little_text_says_what_was_found_and_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["a"])
    with pytest.raises(InvalidDataset, match=r"rows.jsonl holds 1 token; 64 x 1024 = 65536 are needed"):
        load_blocks(TextSource(str(path)), Letters(), num_samples=64, sequence_length=1024)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"sequence_length": 1}, "sequence_length must be at least 2, not 1"),
        ({"max_positions": 7}, "sequence_length 8 exceeds the model's 7"),
    ],
)
def test_shape_out_of_range_is_refused_before_anything_is_read(shape: dict[str, int], message: str) -> None:
    options = {"num_samples": 1, "sequence_length": 8} | shape
    with pytest.raises(InvalidSetting, match=message):
        load_blocks(TextSource("missing.jsonl"), Letters(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_real_tokenizer_separates_rows_but_not_paragraphs(tmp_path: Path, suffix: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = ["It was a dark night.", "Nobody came."]
    path = write(tmp_path / f"rows{suffix}", texts * 3)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    joined = tokenizer("\n\n".join(texts * 3), add_special_tokens=False)["input_ids"]
    rows = [*first, tokenizer.bos_token_id, *second, tokenizer.bos_token_id] * 3
    expected = joined if suffix == ".txt" else rows
    shape = {"num_samples": len(expected) // 8, "sequence_length": 8, "max_positions": 8}
    blocks = load_blocks(TextSource(str(path)), tokenizer, **shape)
    assert blocks.tokens.flatten().tolist() == expected[: len(expected) // 8 * 8]
    assert blocks.source == str(path)


# Blocks on disk


@pytest.fixture
def blocks() -> Blocks:
    return Blocks.of(torch.arange(40).view(5, 8), "made here")


def test_saved_blocks_come_back_identical(tmp_path: Path, blocks: Blocks) -> None:
    blocks.save(tmp_path / "blocks.safetensors")
    loaded = Blocks.load(tmp_path / "blocks.safetensors")
    assert torch.equal(loaded.tokens, blocks.tokens)
    assert (loaded.digest, loaded.source) == (blocks.digest, "made here")
    assert [entry.name for entry in tmp_path.iterdir()] == ["blocks.safetensors"]


def test_altered_truncated_foreign_and_missing_blocks_are_refused(tmp_path: Path, blocks: Blocks) -> None:
    path = tmp_path / "blocks.safetensors"
    blocks.save(path)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + b"\x01")
    with pytest.raises(InvalidDataset, match="were altered: their digest is not"):
        Blocks.load(path)
    path.write_bytes(sound[:-1])
    with pytest.raises(InvalidDataset, match="cannot be read"):
        Blocks.load(path)
    save_file({"tokens": blocks.tokens}, path)
    with pytest.raises(InvalidDataset, match="holds no token blocks: 'orthokv' is missing"):
        Blocks.load(path)
    described = {"orthokv": json.dumps({"digest": blocks.digest, "source": ""})}
    save_file({"other": blocks.tokens}, path, described)
    with pytest.raises(InvalidDataset, match="cannot be read"):
        Blocks.load(path)
    save_file({"tokens": blocks.tokens.float()}, path, described)
    with pytest.raises(InvalidDataset, match=r"must be torch.int64 \[samples, length\], not torch.float32"):
        Blocks.load(path)
    with pytest.raises(InvalidDataset, match="cannot be read"):
        Blocks.load(tmp_path / "missing")


def test_failed_save_leaves_nothing_behind(tmp_path: Path, blocks: Blocks) -> None:
    with pytest.raises(StorageError, match="cannot be written to"):
        blocks.save(tmp_path / "no folder" / "blocks.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="cannot be written to"):
        blocks.save(tmp_path / "taken")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_split_holds_out_evenly_spaced_samples(blocks: Blocks) -> None:
    kept, held = blocks.split(2)
    assert torch.equal(kept.tokens, blocks.tokens[[0, 2, 4]])
    assert torch.equal(held.tokens, blocks.tokens[[1, 3]])
    assert len({kept.digest, held.digest, blocks.digest}) == 3


@given(st.integers(1, 200), st.integers(1, 200))
def test_evenly_gives_every_part_its_share(count: int, wanted: int) -> None:
    found = evenly(count, wanted)
    assert len(found) == min(count, wanted)
    assert found == sorted(set(found))
    assert all(0 <= i < count for i in found)
    for part in range(1, count + 1):  # of the first `part` items, their share to within one
        assert abs(sum(i < part for i in found) - len(found) * part / count) <= 1


@pytest.mark.parametrize("holdout", [-1, 0, 5, 6])
def test_split_leaves_no_part_empty(blocks: Blocks, holdout: int) -> None:
    with pytest.raises(InvalidSetting, match=f"a holdout of {holdout} leaves one part of 5 samples empty"):
        blocks.split(holdout)


# The model's own text


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )
    return LlamaForCausalLM(config)


def sample(model: LlamaForCausalLM, **options: Any) -> Blocks:
    return self_text(model, **{"num_samples": 6, "sequence_length": 24, "seed": 7} | options)


def test_own_text_is_reproducible_and_follows_the_seed(model: LlamaForCausalLM) -> None:
    first = sample(model)
    torch.rand(5)
    assert sample(model).digest == first.digest
    assert sample(model, seed=8).digest != first.digest
    assert first.source == "self (seed 7)"


def test_own_text_starts_with_bos_and_never_ends_early(model: LlamaForCausalLM) -> None:
    tokens = sample(model, num_samples=20, sequence_length=32).tokens
    assert tokens.shape == (20, 32)
    assert (tokens[:, 0] == 1).all()
    assert not torch.isin(tokens, torch.tensor([2, 3])).any()
    assert tokens.unique().numel() > 25


def test_own_text_leaves_model_and_random_state_alone(model: LlamaForCausalLM) -> None:
    model.train()
    before = torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    sample(model, progress=lambda done, total: calls.append((done, total)), batch_size=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert calls == sorted(calls)
    assert calls[-1] == (6 * 23, 6 * 23)


def test_own_text_does_not_depend_on_the_batch_size(model: LlamaForCausalLM) -> None:
    assert sample(model.double(), batch_size=1).digest == sample(model, batch_size=5).digest
    model.float()


def test_a_step_with_the_cache_draws_what_a_full_forward_would(model: LlamaForCausalLM) -> None:
    tokens = sample(model.eval()).tokens
    uniform = torch.rand(6, 23, generator=torch.Generator().manual_seed(7)).double()
    with torch.no_grad():
        logits = model(tokens).logits.double()
    for position in range(1, 24):
        drawn = draw(logits[:, position - 1], uniform[:, position - 1 : position], [2, 3])
        assert torch.equal(drawn, tokens[:, position])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 5.0]]).double().repeat(20_000, 1)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)).double()
    counts = draw(logits, uniform, [3]).bincount(minlength=4) / 20_000
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)
    assert counts[3] == 0
    # At the very bottom of the distribution lies a token that is never drawn.
    assert draw(torch.zeros(1, 4).double(), torch.zeros(1, 1).double(), [0]) == 1
    assert torch.allclose(counts[:3], expected, atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"sequence_length": 33}, "sequence_length 33 exceeds the model's 32"),
    ],
)
def test_own_text_refuses_bad_settings(
    model: LlamaForCausalLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSetting, match=message):
        sample(model, **options)


def test_own_text_needs_bos_and_finite_logits(model: LlamaForCausalLM) -> None:
    model.config.bos_token_id = None
    try:
        with pytest.raises(InvalidDataset, match="no bos_token_id"):
            sample(model)
    finally:
        model.config.bos_token_id = 1
    weight = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(InvalidModel, match="logits are not finite"):
        sample(model)
    model.lm_head.weight.data.copy_(weight)
