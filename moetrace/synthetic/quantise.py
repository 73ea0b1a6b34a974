"""Packing of float32 rows into GGUF types, including Q4_K, which the ``gguf`` package cannot write."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

Q4_K_BLOCK, Q4_K_SUBBLOCK = 256, 32


def pack(values: NDArray[np.float32], qtype: gguf.GGMLQuantizationType) -> NDArray[np.generic]:
    """Return ``values`` packed along the last axis: float16 or float32 as they are, other types as bytes."""
    if qtype == gguf.GGMLQuantizationType.Q4_K:
        # one expert at a time, for the sake of the intermediate arrays
        return np.stack([_pack_q4_k(matrix) for matrix in values]) if values.ndim > 2 else _pack_q4_k(values)
    packed: NDArray[np.generic] = gguf.quants.quantize(values, qtype)
    return packed


def _pack_q4_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pack into ggml's ``block_q4_K``: 8 sub-blocks of 32 values, each ``d * scale * q - dmin * min``.

    Scales and minima are 6-bit, q is 4-bit; scale and minimum come from each sub-block's range, without the
    search for the best ones that llama-quantize does.
    """
    blocks = values.reshape(-1, Q4_K_BLOCK // Q4_K_SUBBLOCK, Q4_K_SUBBLOCK)
    low = np.minimum(blocks.min(axis=-1), 0.0)
    scale = (blocks.max(axis=-1).clip(min=0.0) - low) / 15
    d = (scale.max(axis=-1, keepdims=True) / 63).astype(np.float16)
    d_min = ((-low).max(axis=-1, keepdims=True) / 63).astype(np.float16)
    scale_bits = _ratio(scale, d).round().clip(0, 63).astype(np.uint8)
    min_bits = _ratio(-low, d_min).round().clip(0, 63).astype(np.uint8)

    step = d.astype(np.float32) * scale_bits
    offset = d_min.astype(np.float32) * min_bits
    quants = _ratio(blocks + offset[..., None], step[..., None]).round().clip(0, 15).astype(np.uint8)

    scales, more_scales = np.split(scale_bits, 2, axis=-1)
    mins, more_mins = np.split(min_bits, 2, axis=-1)
    low_bits = (more_scales & 15) | (more_mins & 15) << 4
    bits = np.concatenate([scales | (more_scales >> 4) << 6, mins | (more_mins >> 4) << 6, low_bits], axis=-1)
    nibbles = quants[:, 0::2] | quants[:, 1::2] << 4
    packed = np.concatenate([d.view(np.uint8), d_min.view(np.uint8), bits, nibbles.reshape(-1, 128)], axis=-1)
    return packed.reshape(*values.shape[:-1], -1)


def _ratio(numerator: NDArray[np.floating], denominator: NDArray[np.floating]) -> NDArray[np.float32]:
    """Divide, giving 0 where the denominator is 0 (a block of zeros)."""
    wide = denominator.astype(np.float32)
    ratio = np.zeros(numerator.shape, np.float32)
    np.divide(numerator, wide, out=ratio, where=wide != 0)
    return ratio
