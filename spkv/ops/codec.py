"""How kept pairs are written in fewer bits: a row, one key or value of D elements, becomes codes and scales.

A pair is coded when it leaves the window, once, and every query that meets it past the window meets what its code
says, in decoding as in prefill: so the codec rounds, and the paths still agree.

Pages fill a pair at a time, so scales belong to rows and not to pages: no pair's code depends on a later one.

    int8  D codes of 8 bits, symmetric; a scale a row
    fp8   D codes of 8 bits, e4m3; a scale a row
    int4  D codes of 4 bits, two in a byte (elements d and d + D / 2); a scale and a least value for every 32 elements

Scales are float16. In a page, the codes of P keys and of P values come first, then their scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spkv.config import check_page_dtype

_FP8_MAX = 448.0
_FLOAT16_MAX = 65504.0
_TINY = 2.0**-24  # the least float16 above 0: a row of zeros has a scale, too
_GROUP = 32


@dataclass(frozen=True)
class Codec:
    """One way to code rows.

    Attributes:
        name: "int8", "fp8" or "int4".
        bits: of a code.
    """

    name: str
    bits: int

    def code_bytes(self, head_size: int) -> int:
        """Bytes of a row's codes."""
        return head_size * self.bits // 8

    def scales(self, head_size: int) -> int:
        """float16 numbers beside a row's codes."""
        return 2 * (head_size // _GROUP) if self.name == "int4" else 1

    def page_bytes(self, pairs: int, head_size: int) -> int:
        """Bytes of a page."""
        return 2 * pairs * (self.code_bytes(head_size) + 2 * self.scales(head_size))

    def obstacle(self, head_size: int) -> str | None:
        """Why rows of this size cannot be coded, or None."""
        if self.name == "int4" and head_size % (2 * _GROUP):
            return f"int4 takes head sizes that are multiples of {2 * _GROUP}, not {head_size}"
        return None

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [..., D] -> codes [..., code_bytes] uint8 and scales [..., scales] float16."""
        rows = rows.float()
        if self.name == "int4":
            groups = rows.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).unflatten(-1, (-1, _GROUP))
            least = groups.amin(-1, keepdim=True).half()
            step = _ratio(groups.amax(-1, keepdim=True) - least.float(), 15.0).clamp_min(_TINY).half()
            codes = _nearest((groups - least.float()) / step.float()).clamp(0, 15).to(torch.uint8).flatten(-2)
            low, high = codes.chunk(2, -1)
            return low | (high << 4), torch.cat([step, least], -1).flatten(-2)
        most = rows.abs().amax(-1, keepdim=True)
        if self.name == "fp8":
            scale = _ratio(most, _FP8_MAX).clamp_min(_TINY).half()
            codes = (rows / scale.float()).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        else:
            scale = _ratio(most, 127.0).clamp_min(_TINY).half()
            codes = _nearest(rows / scale.float()).clamp(-127, 127).to(torch.int8)
        return codes.view(torch.uint8), scale

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The inverse of `encode`, up to rounding: rows [..., D] in float32."""
        if self.name == "int4":
            wide = torch.cat([codes & 15, codes >> 4], -1).float().unflatten(-1, (-1, _GROUP))
            step, least = scales.float().unflatten(-1, (-1, 2)).split(1, -1)
            return (wide * step + least).flatten(-2)
        kind = torch.float8_e4m3fn if self.name == "fp8" else torch.int8
        return codes.view(kind).float() * scales.float()

    def round(self, rows: Tensor) -> Tensor:
        """What is left of rows [..., D] once they are coded, in their own dtype."""
        return self.decode(*self.encode(rows)).to(rows.dtype)


CODECS = {codec.name: codec for codec in (Codec("int8", 8), Codec("fp8", 8), Codec("int4", 4))}


def codec(name: str) -> Codec:
    """The codec of one of `spkv.config.PAGE_DTYPES`; raises a ValueError for others."""
    check_page_dtype(name)
    return CODECS[name]


def _ratio(numbers: Tensor, divisor: float) -> Tensor:
    # On CUDA dividing by a Python number multiplies by its reciprocal, which rounds once more.
    return numbers / torch.full_like(numbers, divisor)


def _nearest(numbers: Tensor) -> Tensor:
    return (numbers + 0.5).floor()
