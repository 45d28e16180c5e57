"""How many bytes a codec takes: integers only, without torch. What packs the numbers is in `orthokv.runtime.codecs`."""

from __future__ import annotations

from dataclasses import dataclass

from orthokv.spec.errors import InvalidSetting

# Bits a number of each codec; None: as many as the model's own numbers have.
CODEC_BITS: dict[str, int | None] = {"16-bit": 16, "native": None}
DEFAULT_CODEC = "16-bit"


@dataclass(frozen=True)
class CodecSpec:
    """Sizes of a codec.

    Attributes:
        bits: bits of one latent number.
        block: tokens that are packed together, in one row.
        scale_bits: bits of the scales of one row, stored inside it.
        window: last tokens that stay in 16 bits.
        sinks: first tokens that stay in 16 bits.
    """

    name: str
    bits: int
    block: int = 1
    scale_bits: int = 0
    window: int = 0
    sinks: int = 0

    def row_bytes(self, rank: int) -> int:
        """Bytes of `block` tokens of one group at a rank, scales included."""
        return -(-(self.block * rank * self.bits + self.scale_bits) // 8)


def codec_spec(name: str, number_bytes: int) -> CodecSpec:
    """The sizes of a codec on a model whose own numbers have `number_bytes`.

    Raises:
        InvalidSetting: there is no such codec.
    """
    if name not in CODEC_BITS:
        raise InvalidSetting(f"codec must be one of {', '.join(CODEC_BITS)}, not {name!r}")
    return CodecSpec(name, CODEC_BITS[name] or 8 * number_bytes)
