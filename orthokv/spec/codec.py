"""How many bytes a stored latent takes. Integers only: what packs the numbers stands in `orthokv.runtime.codecs`."""

from __future__ import annotations

from dataclasses import dataclass

from orthokv.spec.errors import InvalidSetting
from orthokv.spec.vocabulary import CODECS, CodecName

DEFAULT_CODEC: CodecName = "16-bit"
# Numbers that are stored as they are, in the sinks and in the recent window, take 16 bits.
EXACT_BYTES = 2


@dataclass(frozen=True)
class CodecSpec:
    """The sizes of a codec, whose unit is a block of `block` tokens of one group with its scales inside.

    Attributes:
        name: as in `CODECS`.
        bits: of one latent number.
        block: tokens that are packed together; 1: every token has a row of its own.
        scale_bits: of all scales and offsets of a block.
        window: the most recent tokens, which are kept whole in 16 bits.
        sinks: the first tokens, likewise.
    """

    name: str
    bits: int
    block: int = 1
    scale_bits: int = 0
    window: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("bits", 1), ("block", 1), ("scale_bits", 0), ("window", 0), ("sinks", 0)):
            if getattr(self, name) < least:
                raise InvalidSetting(f"{name} of a codec must be at least {least}, not {getattr(self, name)}")

    def row_bytes(self, rank: int) -> int:
        """Bytes of one packed block of one group whose latents have `rank` numbers."""
        return -(-(self.bits * rank * self.block + self.scale_bits) // 8)

    def exact_tokens(self, tokens: int) -> int:
        """How many of `tokens` are kept whole: sinks and window."""
        return min(tokens, self.sinks + self.window)

    def waiting_tokens(self, tokens: int) -> int:
        """How many of the others do not fill a block yet: they wait as latents of 16 bits a number."""
        return (tokens - self.exact_tokens(tokens)) % self.block

    def stored_bytes(self, rank: int, tokens: int, width: int) -> int:
        """Bytes of `tokens` of one group: packed blocks, latents that wait, and whole tokens of `width` numbers."""
        exact, waiting = self.exact_tokens(tokens), self.waiting_tokens(tokens)
        blocks = (tokens - exact - waiting) // self.block
        return blocks * self.row_bytes(rank) + EXACT_BYTES * (waiting * rank + exact * width)


SIXTEEN_BIT = CodecSpec("16-bit", 16)


def codec_spec(name: str, number_bytes: int = EXACT_BYTES) -> CodecSpec:
    """A codec by name, under a model whose own numbers take `number_bytes`.

    `16-bit` stores 16 bits whatever the model computes in; `native` stores the model's own numbers, which rounds nothing.

    Raises:
        InvalidSetting: there is no such codec.
    """
    check_codec(name)
    return SIXTEEN_BIT if name == SIXTEEN_BIT.name else CodecSpec(name, 8 * number_bytes)


def check_codec(name: str) -> CodecName:
    """The name, if it is one of `CODECS`; `InvalidSetting` otherwise."""
    if name not in CODECS:
        raise InvalidSetting(f"codec must be one of {', '.join(CODECS)}, not {name!r}")
    return name
