"""A model's GGUF file, in one part or several: sizes, vocabulary, router weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError

_SPACE = "▁"  # what SentencePiece writes for a space
_BYTE_TOKEN = 6  # llama.cpp's LLAMA_TOKEN_TYPE_BYTE
_SAMPLE_BYTES = 4096  # of each tensor
_LITERAL_TOKENS = (2, 3, 4)  # unknown, control, user-defined: their text stands for itself


@dataclass(frozen=True)
class Router:
    """One layer's router, dequantised.

    Attributes
    ----------
    weight
        (E, D) float32: logits = weight @ gate_input + bias.
    bias
        (E,) float32, or None.
    selection_bias
        (E,) float32, added to the scores for choosing only (DeepSeek-V3, GLM-4.5); or None.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    selection_bias: NDArray[np.float32] | None


class ModelFile:
    """A model's GGUF file, mapped; tensors are read when asked for.

    Of a model in several parts (``NAME-00001-of-00003.gguf``, as large ones are published) any part stands for all:
    metadata is the first one's, tensors are those of all.

    Attributes
    ----------
    path
        As it was given.
    parts
        All files of the model, in order; one, if it is not split.

    Raises
    ------
    InputError
        If it is missing or no GGUF, or a part of the model is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        readers = _open_parts(self.path)
        self.parts = tuple(readers)
        self._reader = readers[self.parts[0]]
        self._tensors: dict[str, Any] = {}
        for part, reader in readers.items():
            for tensor in reader.tensors:
                if tensor.name in self._tensors:
                    raise InputError(f"{part} has {tensor.name}, which another part of the model has too")
                self._tensors[tensor.name] = tensor
        said = _number(self._reader, "split.tensors.count", len(self._tensors))
        if len(self.parts) > 1 and said != len(self._tensors):
            raise InputError(
                f"the parts of {self.parts[0]} do not belong together",
                why=f"it says that the model has {said} tensors, and they have {len(self._tensors)}",
                fix="get all parts of the model anew",
            )

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._tensors = {}
        self._reader = None

    def field(self, key: str, default: Any = None) -> Any:
        """Give one value of the file's metadata; ``{arch}`` in the key stands for the architecture."""
        found = self._reader.get_field(key.replace("{arch}", self.architecture) if "{arch}" in key else key)
        return default if found is None else found.contents()

    @cached_property
    def architecture(self) -> str:
        """For example ``gpt-oss``."""
        return str(self.field("general.architecture", ""))

    @property
    def name(self) -> str:
        """What the file calls itself; empty if it does not."""
        return str(self.field("general.name", ""))

    @property
    def n_bytes(self) -> int:
        """Size of the file; of all parts, if it is split."""
        return sum(part.stat().st_size for part in self.parts)

    @property
    def n_layer(self) -> int:
        """Layers, dense ones included."""
        return int(self.field("{arch}.block_count", 0))

    @property
    def n_embd(self) -> int:
        """Width of the model."""
        return int(self.field("{arch}.embedding_length", 0))

    @property
    def n_expert(self) -> int:
        """Experts per layer; 0 for a dense model."""
        return int(self.field("{arch}.expert_count", 0))

    @property
    def n_expert_used(self) -> int:
        """Experts chosen per token and layer; 0 for a dense model."""
        return int(self.field("{arch}.expert_used_count", 0))

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary; 0 if the file has none."""
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        return 0 if tokens is None else len(tokens.data)

    @property
    def n_params(self) -> int:
        """Numbers in all tensors."""
        return sum(int(tensor.n_elements) for tensor in self._tensors.values())

    def experts_of(self, layer: int) -> int:
        """Experts of a layer, as its tensors have them; 0 if it has none."""
        names = (f"blk.{layer}.{name}.weight" for name in ("ffn_gate_inp", "ffn_up_exps", "ffn_gate_up_exps"))
        return next((self.shape(name)[0] for name in names if self.has_tensor(name)), 0)

    @cached_property
    def moe_layers(self) -> list[int]:
        """The layers that have a router, ascending."""
        prefix, suffix = "blk.", ".ffn_gate_inp.weight"
        names = (n for n in self._tensors if n.startswith(prefix) and n.endswith(suffix))
        return sorted(int(n[len(prefix) : -len(suffix)]) for n in names)

    @property
    def fields(self) -> list[Any]:
        """The model's metadata, as gguf.ReaderField, in the file's order; not how it is split."""
        return [field for name, field in self._reader.fields.items() if not name.startswith("split.")]

    @property
    def tensor_names(self) -> list[str]:
        """The model's tensors, in the file's order."""
        return list(self._tensors)

    def stored(self, name: str) -> tuple[NDArray[Any], Any]:
        """Give a tensor's values as they are stored, a view of the file, and their gguf.GGMLQuantizationType.

        Quantised values are bytes, outermost axis first. Raises InputError if the file has no such tensor.
        """
        tensor = self._stored(name)
        return tensor.data, tensor.tensor_type

    def layer_expert_bytes(self, layer: int) -> int:
        """Bytes of all experts of a layer as the file stores them. Raises InputError if the layer has none."""
        return self.expert_bytes(layer) * self.experts_of(layer)

    @property
    def gpu_bytes_beside_experts(self) -> int:
        """Bytes of the tensors that llama.cpp puts on the GPU with all layers on it (-ngl 99), experts left out.

        The embedding of tokens stays with the CPU; where it is the output matrix too, the GPU has a copy.
        """
        total = sum(int(t.n_bytes) for name, t in self._tensors.items() if "_exps." not in name)
        embedding = self._tensors.get("token_embd.weight")
        if embedding is not None and "output.weight" in self._tensors:
            total -= int(embedding.n_bytes)
        return total

    def kv_bytes(self, n_ctx: int) -> int | None:
        """Bytes of a KV cache in F16 of so many positions; None for architectures whose cache is of another kind.

        That is: with latent attention (``kv_lora_rank``), sliding windows, or recurrent layers.
        """
        other = ("attention.kv_lora_rank", "attention.sliding_window", "ssm.state_size", "ssm.conv_kernel")
        if any(self.field(f"{{arch}}.{key}", 0) for key in other):
            return None
        heads = self.field("{arch}.attention.head_count", 0)
        kv = self.field("{arch}.attention.head_count_kv", heads)
        per_layer = kv if isinstance(kv, list) else [kv] * self.n_layer
        if not isinstance(heads, int) or heads <= 0 or not all(isinstance(n, int) for n in per_layer):
            return None
        width = self.n_embd // heads
        both = self.field("{arch}.attention.key_length", width) + self.field(
            "{arch}.attention.value_length", width
        )
        return 2 * n_ctx * int(both) * int(sum(per_layer))

    def expert_bytes(self, layer: int) -> int:
        """Bytes of one expert of a layer as the file stores it: its share of every tensor of the layer's experts.

        Raises
        ------
        InputError
            If the layer has no experts.
        """
        prefix = f"blk.{layer}.ffn_"
        names = [name for name in self.tensor_names if name.startswith(prefix) and "_exps." in name]
        if not names:
            raise InputError(f"{self.path} has no experts in layer {layer}")
        return sum(int(self.stored(name)[0].nbytes) for name in names) // self.shape(names[0])[0]

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in numpy's order of axes. Raises InputError if the file has no such tensor."""
        return tuple(int(n) for n in reversed(self._stored(name).shape))

    def tensor(self, name: str, index: int | None = None) -> NDArray[np.float32]:
        """Give a tensor dequantised to float32, in numpy's order of axes (outermost first); a copy.

        Parameters
        ----------
        index
            Of the outermost axis: only that part is dequantised (one expert of a stack of them).

        Raises
        ------
        InputError
            If the file has no such tensor.
        """
        from gguf import dequantize

        tensor = self._stored(name)
        data, shape = tensor.data, self.shape(name)
        if index is not None:
            data, shape = data[index : index + 1], shape[1:]
        return np.array(dequantize(data, tensor.tensor_type), np.float32).reshape(shape)

    def _stored(self, name: str) -> Any:
        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name}")
        return self._tensors[name]

    def router(self, layer: int) -> Router:
        """Give the router of one layer.

        Raises
        ------
        InputError
            If the layer has none.
        """

        def optional(name: str) -> NDArray[np.float32] | None:
            return self.tensor(name) if name in self._tensors else None

        return Router(
            self.tensor(f"blk.{layer}.ffn_gate_inp.weight"),
            optional(f"blk.{layer}.ffn_gate_inp.bias"),
            optional(f"blk.{layer}.exp_probs_b.bias"),
        )

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests that tell models of one name and shape apart; 64 bits each, in hexadecimal.

        ``routers``: of every router, how it is stored and its values; llama.cpp leaves routers as they are when it
        quantises, so that quantisations of one model agree. ``tokens``: of the vocabulary. ``weights``: of every
        tensor, how it is stored and its first 4 KiB; quantisations differ, copies of a file do not.
        """
        routers, weights = _Digest(), _Digest()
        for name in sorted(self._tensors):
            data, kind = self.stored(name)
            stored = data.reshape(-1).view(np.uint8)
            weights.add(name, kind.name, self.shape(name), stored[:_SAMPLE_BYTES])
            if ".ffn_gate_inp." in name or ".exp_probs_b." in name:
                routers.add(name, kind.name, self.shape(name), stored)
        tokens = _Digest()
        for token in self.vocabulary:
            tokens.add(len(token), token)
        return {"routers": routers.text, "tokens": tokens.text, "weights": weights.text}

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The text of each token id, as bytes: one piece need not be whole UTF-8."""
        tokens = [str(token) for token in self.field("tokenizer.ggml.tokens", [])]
        types = self.field("tokenizer.ggml.token_type") or [1] * len(tokens)
        kind = self.field("tokenizer.ggml.model", "")
        pairs = zip(tokens, types, strict=False)
        if kind == "gpt2":
            table = _byte_table()
            return [_literal(t) if code in _LITERAL_TOKENS else _bytes_of(t, table) for t, code in pairs]
        return [_sentencepiece(t, code) for t, code in pairs]


class _Digest:
    """A digest of what is added to it."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=8)

    def add(self, *parts: object) -> None:
        for part in parts:
            if isinstance(part, np.ndarray):
                self._state.update(np.ascontiguousarray(part).data)
            else:
                self._state.update(part if isinstance(part, bytes) else f"{part};".encode())

    @property
    def text(self) -> str:
        return self._state.hexdigest()


def _open_parts(path: Path) -> dict[Path, Any]:
    """Give the parts of a model, in order, each with its gguf.GGUFReader; one, if it is not split."""
    reader = _open(path)
    count, number = _number(reader, "split.count", 1), _number(reader, "split.no", 0)
    if count <= 1:
        return {path: reader}
    prefix = path.name.removesuffix(_part_ending(number, count))
    if prefix in ("", path.name) or number >= count:
        raise InputError(
            f"{path} is part {number + 1} of {count} of a model, and its name does not say where the others are",
            why=f"llama.cpp names it NAME{_part_ending(number, count)}",
            fix="give all parts the names that they were published with",
        )
    out: dict[Path, Any] = {}
    for i in range(count):
        part = path.with_name(prefix + _part_ending(i, count))
        if not part.is_file():
            raise InputError(
                f"{part} is missing",
                why=f"it is part {i + 1} of {count} of the model, and {path.name} is part {number + 1}",
                fix="put all parts into one folder",
            )
        out[part] = reader if i == number else _open(part)
        if (_number(out[part], "split.no", -1), _number(out[part], "split.count", -1)) != (i, count):
            raise InputError(
                f"{part} is not part {i + 1} of {count} of a model",
                why="it says so itself",
                fix="give all parts the names that they were published with",
            )
    return out


def _open(path: Path) -> Any:
    from gguf import GGUFReader  # costs a tenth of a second: only who needs it pays

    try:
        return GGUFReader(path)
    except Exception as e:  # gguf lets errors of all kinds out of a damaged file
        raise InputError(f"{path} is no GGUF model that can be read", why=str(e)[:200]) from e


def _part_ending(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"  # llama_split_path


def _number(reader: Any, key: str, default: int) -> int:
    field = reader.get_field(key)
    value = default if field is None else field.contents()
    return value if isinstance(value, int) else default


def _literal(token: str) -> bytes:
    return token.encode("utf-8", "replace")


def _byte_table() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters, inverted (openai/gpt-2, encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = (b for b in range(256) if b not in plain)
    table.update((chr(256 + i), b) for i, b in enumerate(others))
    return table


def _bytes_of(token: str, table: Mapping[str, int]) -> bytes:
    return b"".join(bytes([table[c]]) if c in table else _literal(c) for c in token)


def _sentencepiece(token: str, code: int) -> bytes:
    if code == _BYTE_TOKEN and len(token) == 6 and token.startswith("<0x"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return _literal(token if code in _LITERAL_TOKENS else token.replace(_SPACE, " "))
