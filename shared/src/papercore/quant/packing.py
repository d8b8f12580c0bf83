"""Codes of 2 to 8 bits as a little-endian bit stream, one padded row of bytes for every row of codes.

Bit i of column k is bit (k b + i) of the row's stream, and bit j of the stream is bit j mod 8 of byte j // 8. With
4 bits the low nibble is therefore the even column. Signed codes are stored as two's complement in b bits.
"""

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from papercore.errors import InputError


def pack_codes(codes: Int[Tensor, "*rows columns"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """[..., K] codes of any integer type -> [..., ceil(K b / 8)] bytes.

    Raises:
        InputError: a code does not fit into `bits` bits.
    """
    check_bits(bits)
    if codes.is_floating_point():
        raise InputError("codes", found=str(codes.dtype), expected="an integer type")
    if codes.numel():
        smallest, largest = int(codes.min()), int(codes.max())
        signed = smallest < 0
        if smallest < -(2 ** (bits - 1)) or largest > (2 ** (bits - 1) if signed else 2**bits) - 1:
            raise InputError("codes", found=f"{smallest}..{largest}", expected=f"{bits} bits")
    unsigned = codes.to(torch.int16) & (2**bits - 1)
    if bits == 8:
        return unsigned.to(torch.uint8)
    stream = (unsigned[..., None] >> torch.arange(bits, device=codes.device)) & 1
    stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    weights = 1 << torch.arange(8, device=codes.device)
    return (stream.reshape(*stream.shape[:-1], stream.shape[-1] // 8, 8) * weights).sum(-1).to(torch.uint8)


def unpack_codes(
    packed: UInt8[Tensor, "*rows bytes"], bits: int, columns: int, *, signed: bool = False
) -> Int[Tensor, "*rows columns"]:
    """The inverse of `pack_codes`, int16.

    Raises:
        InputError: the rows have not ceil(columns b / 8) bytes.
    """
    check_bits(bits)
    expected = -(-columns * bits // 8)
    if packed.shape[-1] != expected:
        raise InputError("packed row", found=f"{packed.shape[-1]} bytes", expected=f"{expected} for {columns} codes")
    if bits == 8:
        codes = packed.to(torch.int16)
    else:
        stream = (packed.to(torch.int16)[..., None] >> torch.arange(8, device=packed.device)) & 1
        stream = stream.reshape(*packed.shape[:-1], expected * 8)[..., : columns * bits]
        weights = 1 << torch.arange(bits, device=packed.device)
        codes = (stream.reshape(*packed.shape[:-1], columns, bits) * weights).sum(-1).to(torch.int16)
    if signed:
        codes = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    return codes


def check_bits(bits: int) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise InputError("bits", found=bits, expected="a whole number from 2 to 8")
