"""Write a model to a GGUF file, one tensor at a time."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.synthetic.architectures import (
    ARCHITECTURES,
    Architecture,
    Array,
    Kind,
    Tensor,
    Value,
    hyperparameters,
    tensors,
)
from moetrace.synthetic.quantise import pack
from moetrace.synthetic.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    N_VOCAB_DEFAULT,
    N_VOCAB_MIN,
    PAD,
    TURN_END,
    Vocabulary,
    vocabulary,
)

Overrides: TypeAlias = Mapping[str, NDArray[Any]] | Callable[[str, Array], NDArray[Any] | None]

_Type = gguf.GGMLQuantizationType
_FileType = gguf.LlamaFileType

QUANTIZATIONS: Mapping[str | None, tuple[_Type, _Type, _FileType]] = {
    # name: type of the experts' matrices, of the other matrices, general.file_type
    None: (_Type.F32, _Type.F32, _FileType.ALL_F32),
    "F16": (_Type.F16, _Type.F16, _FileType.MOSTLY_F16),
    "Q8_0": (_Type.Q8_0, _Type.F16, _FileType.MOSTLY_Q8_0),
    "Q4_K": (_Type.Q4_K, _Type.F16, _FileType.MOSTLY_Q4_K_S),
    "MXFP4": (_Type.MXFP4, _Type.F16, _FileType.MOSTLY_MXFP4_MOE),
}


def write_model(
    path: str | os.PathLike[str],
    architecture: str | Architecture = "gpt-oss",
    *,
    n_layer: int | None = None,
    n_embd: int | None = None,
    n_head: int | None = None,
    n_head_kv: int | None = None,
    n_expert: int | None = None,
    n_expert_used: int | None = None,
    n_ff_expert: int | None = None,
    n_ctx_train: int | None = None,
    n_vocab: int = N_VOCAB_DEFAULT,
    quantization: str | None = None,
    seed: int = 0,
    router_gain: float = 2.0,
    overrides: Overrides | None = None,
) -> Path:
    """Write a model with random weights that llama.cpp loads and generates text with.

    The weights are drawn so that every expert is used, routing differs from token to token, the text is
    printable and does not end by itself. The same arguments give the same bytes; each tensor's values depend
    only on ``seed``, its name and its shape, so replacing one leaves the others as they were. Memory needed:
    about twice the largest tensor in float32.

    Parameters
    ----------
    path
        The file to write; replaced if it exists, and only once it is complete.
    architecture
        A name from :data:`ARCHITECTURES`, or an :class:`Architecture` (``dataclasses.replace`` one for what
        has no argument here).
    n_layer, n_embd, n_head, n_head_kv, n_expert, n_expert_used, n_ff_expert, n_ctx_train
        Sizes; by default the architecture's own small ones.
    n_vocab
        Tokens in the vocabulary: the 256 bytes, the control tokens, merges, and unused ones for the rest.
    quantization
        Type of the experts' matrices: None (F32), "F16", "Q8_0", "MXFP4" (rows of a multiple of 32) or "Q4_K"
        (of 256). With None all other matrices are F32, otherwise F16; routers, norms and biases always F32.
    seed
        Seed of all random weights.
    router_gain
        Standard deviation of the router's logits over tokens: small is near-ties, large is confident.
    overrides
        Tensors to plant, float arrays by GGUF name in numpy's shape; or a function of name and drawn values
        (float32) that returns the replacement or None to keep them.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    UsageError
        For an unknown architecture, quantization or tensor name, sizes that do not fit together, or an
        override of the wrong shape or with values that are not finite.
    """
    path = Path(path)
    arch = _resolve(
        architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_ff_expert=n_ff_expert,
        n_ctx_train=n_ctx_train,
    )
    if quantization not in QUANTIZATIONS:
        raise _unknown("quantization", str(quantization), [str(name) for name in QUANTIZATIONS])
    if n_vocab < N_VOCAB_MIN:
        raise UsageError(f"n_vocab {n_vocab} is too small", fix=f"use {N_VOCAB_MIN} or more")
    vocab = vocabulary(n_vocab)
    layout = list(tensors(arch, vocab.plain, router_gain))
    types = [_storage_type(tensor, quantization) for tensor in layout]
    if isinstance(overrides, Mapping):
        for name in overrides.keys() - {tensor.name for tensor in layout}:
            raise _unknown("tensor", name, [tensor.name for tensor in layout])

    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, arch.gguf_name)
    try:
        _add_metadata(writer, arch, vocab, QUANTIZATIONS[quantization][2])
        for tensor, qtype in zip(layout, types, strict=True):
            shape, dtype = _stored_shape(tensor, qtype)
            n_bytes = math.prod(shape) * dtype.itemsize
            writer.add_tensor_info(tensor.name, shape, dtype, n_bytes, raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, qtype in zip(layout, types, strict=True):
            writer.write_tensor_data(pack(_values(tensor, seed, overrides), qtype))
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return path


def _resolve(architecture: str | Architecture, **sizes: Any) -> Architecture:
    if isinstance(architecture, str):
        if architecture not in ARCHITECTURES:
            raise _unknown("architecture", architecture, ARCHITECTURES)
        architecture = ARCHITECTURES[architecture]
    arch = dataclasses.replace(architecture, **{name: n for name, n in sizes.items() if n is not None})
    moe, groups = arch.n_expert > 0, arch.n_expert_groups
    counts = (arch.n_layer, arch.n_embd, arch.n_head, arch.n_head_kv, arch.n_ff_expert, arch.n_ctx_train)
    if min(counts) < 1 or arch.n_expert < 0:
        raise UsageError(f"The sizes of the {arch.gguf_name} model must be positive numbers")
    broken = {
        "n_embd must be a multiple of n_head": arch.n_embd % arch.n_head,
        "n_embd / n_head must be even, for the rotary embedding": arch.n_head_dim % 2,
        "n_head must be a multiple of n_head_kv": arch.n_head % arch.n_head_kv,
        "n_expert_used must be in 1 .. n_expert": moe and not 0 < arch.n_expert_used <= arch.n_expert,
        "n_expert must be a multiple of n_expert_groups": groups and arch.n_expert % groups,
        "n_layer leaves no layer with experts": moe and not arch.moe_layers,
        "n_layer leaves no layer with attention": arch.n_layer < arch.attention_every,
        "llama.cpp's encoder has experts in every second layer": arch.encoder and arch.moe_every != 2,
        "llama.cpp takes 26 or 27 layers for a variant without low-rank queries": (
            arch.latent_kv and arch.n_layer in (26, 27)
        ),
    }
    for rule, is_broken in broken.items():
        if is_broken:
            raise UsageError(f"The sizes of the {arch.gguf_name} model do not fit together", why=rule)
    return arch


def _unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3) or sorted(names)[:20]
    return UsageError(f"Unknown {what} {name!r}", fix=f"use one of: {', '.join(near)}")


def _storage_type(tensor: Tensor, quantization: str | None) -> _Type:
    expert, other, _ = QUANTIZATIONS[quantization]
    qtype = {Kind.EXPERT: expert, Kind.MATRIX: other, Kind.EXACT: _Type.F32}[tensor.kind]
    block = gguf.GGML_QUANT_SIZES[qtype][0]
    if tensor.shape[-1] % block:
        raise UsageError(
            f"{tensor.name} cannot be stored as {qtype.name}",
            why=f"its rows have {tensor.shape[-1]} values, which is not a multiple of {block}",
            fix=f"choose n_embd and n_ff_expert as multiples of {block}",
        )
    return qtype


def _stored_shape(tensor: Tensor, qtype: _Type) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if qtype == _Type.F32:
        return tensor.shape, np.dtype(np.float32)
    if qtype == _Type.F16:
        return tensor.shape, np.dtype(np.float16)
    return gguf.quant_shape_to_byte_shape(tensor.shape, qtype), np.dtype(np.uint8)


def _values(tensor: Tensor, seed: int, overrides: Overrides | None) -> Array:
    if isinstance(overrides, Mapping) and tensor.name in overrides:
        planted: NDArray[Any] | None = overrides[tensor.name]
    else:
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        drawn = tensor.init(rng, tensor.shape)
        planted = overrides(tensor.name, drawn) if callable(overrides) else None
        if planted is None:
            return drawn
    values = np.ascontiguousarray(planted, dtype=np.float32)
    if values.shape != tensor.shape:
        what = f"The override of {tensor.name} has shape {values.shape}"
        raise UsageError(what, fix=f"give it {tensor.shape}")
    if not np.isfinite(values).all():
        raise UsageError(f"The override of {tensor.name} has values that are not finite")
    return values


def _add_metadata(
    writer: gguf.GGUFWriter, arch: Architecture, vocab: Vocabulary, file_type: _FileType
) -> None:
    writer.add_name(f"synthetic {arch.gguf_name}, random weights")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    keys: dict[str, Value] = {**hyperparameters(arch), "vocab_size": len(vocab.tokens)}
    for key, value in keys.items():
        _add(writer, f"{arch.gguf_name}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    writer.add_bos_token_id(vocab.id(BOS))
    writer.add_eos_token_id(vocab.id(EOS))
    writer.add_eot_token_id(vocab.id(TURN_END))
    writer.add_pad_token_id(vocab.id(PAD))
    writer.add_add_bos_token(arch.add_bos)
    writer.add_add_eos_token(False)
    if arch.encoder:
        writer.add_token_type_count(1)
    else:
        writer.add_chat_template(CHAT_TEMPLATE)


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
