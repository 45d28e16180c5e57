"""Text to token blocks of one length, taken evenly from the source."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from orthokv.spec.errors import InvalidDataset, InvalidSetting
from orthokv.text import readers
from orthokv.text.blocks import Blocks, evenly
from orthokv.text.readers import cut, read_texts
from orthokv.text.source import TextSource

# How many times the needed text is read at most, to take the blocks evenly from it.
SPREAD = 8


def load_blocks(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    sequence_length: int,
    max_positions: int | None = None,
) -> Blocks:
    """Read and pack `source`; see `read_texts` and `pack` (`self`: `self_text`).

    Up to `SPREAD` times as much text as needed is read and the blocks are taken evenly from it: consecutive blocks of
    one long document say much less about a text than as many blocks of different documents.
    """
    check_shape(num_samples, sequence_length, max_positions)  # before a download starts
    return pack(
        read_texts(source),
        tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length,
        spread=SPREAD,
        # A file of plain text is one document, whatever chunks it is read in.
        separate=source.resolved_format() != "text",
        source=source.source,
    )


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    sequence_length: int,
    max_positions: int | None = None,
    separate: bool = True,
    spread: int = 1,
    source: str = "text",
) -> Blocks:
    """Tokenise texts in reading order, join them and cut the stream into blocks; stop once there are enough.

    With `separate` one token stands between two texts: BOS, else EOS, where the tokenizer has one; no other
    special token is added. With `spread` above 1, up to that many times `num_samples` blocks are made and the result
    is taken evenly from them. `source` names the text in errors and in the result.

    Raises:
        InvalidDataset: there are too few tokens.
        InvalidSetting: the shape is out of range.
    """
    check_shape(num_samples, sequence_length, max_positions)
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    needed = num_samples * sequence_length
    most = spread * needed
    stream = array("q")
    for index, text in enumerate(texts):
        if index and separate and isinstance(mark, int):
            stream.append(mark)
        while text and len(stream) < most:
            end = len(text) if len(text) <= readers.CHUNK_CHARACTERS else cut(text, readers.CHUNK_CHARACTERS)
            stream.extend(tokenizer(text[:end], add_special_tokens=False, verbose=False)["input_ids"])
            text = text[end:]
        if len(stream) >= most:
            break
    if len(stream) < needed:
        found = f"{len(stream)} token{'' if len(stream) == 1 else 's'}"
        raise InvalidDataset(
            f"{source} holds {found}; {num_samples} x {sequence_length} = {needed} are needed"
        )
    count = min(len(stream), most) // sequence_length
    tokens = torch.frombuffer(stream, dtype=torch.int64)[: count * sequence_length].view(
        count, sequence_length
    )
    return Blocks.of(tokens[evenly(count, num_samples)], source)


def check_shape(num_samples: int, sequence_length: int, max_positions: int | None) -> None:
    if num_samples < 1:
        raise InvalidSetting(f"num_samples must be at least 1, not {num_samples}")
    if sequence_length < 2:
        raise InvalidSetting(f"sequence_length must be at least 2, not {sequence_length}")
    if max_positions is not None and sequence_length > max_positions:
        raise InvalidSetting(f"sequence_length {sequence_length} exceeds the model's {max_positions}")
