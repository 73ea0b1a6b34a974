"""What llama.cpp's Mixture-of-Experts architectures are made of, as far as a small model needs it.

An :class:`Architecture` says what is special about one; :func:`hyperparameters` and :func:`tensors` turn it
into the GGUF keys and tensors that llama.cpp's loader asks for. Shapes are numpy's (slowest axis first), the
reverse of what ggml prints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Init: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], Array]
Value: TypeAlias = bool | int | float | str | list[int]


class Gating(Enum):
    """How router logits become the scores that top-k selects on and the weights that mix the experts."""

    SOFTMAX = 1
    """Softmax over all experts, then top-k."""
    SIGMOID = 2
    """Each expert on its own."""
    SOFTMAX_WEIGHT = 3
    """Top-k on the logits, then softmax over the chosen ones only (gpt-oss)."""


class Mixer(Enum):
    """What a layer without attention uses instead."""

    NONE = ""
    MAMBA = "mamba"
    MAMBA2 = "mamba2"
    SHORTCONV = "shortconv"


class Kind(Enum):
    """What a tensor is, which decides the type it is stored in."""

    EXPERT = "expert"
    """The matrices of all experts of a layer, stacked: (n_expert, rows, columns)."""
    MATRIX = "matrix"
    """Any other matrix."""
    EXACT = "exact"
    """Routers, norms, biases and state-space parameters: always F32, as llama.cpp's converters write them."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model: GGUF name, numpy shape, kind, and how its values are drawn."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    init: Init


@dataclass(frozen=True)
class Architecture:
    """One llama.cpp architecture in one variant, with sizes small enough for tests."""

    gguf_name: str
    """``general.architecture``."""

    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_ctx_train: int = 4096
    n_expert: int = 8
    n_expert_used: int = 2
    n_ff_expert: int = 32
    n_ff: int = 96
    """Width of the dense layers; where ``expert_ff_key`` is false llama.cpp has one width for both kinds."""
    expert_ff_key: bool = True
    """Whether the experts' width has a key of its own, ``expert_feed_forward_length``."""

    gating: Gating = Gating.SOFTMAX
    gating_key: bool = False
    """Whether the gating function and the normalisation are read from the file, rather than fixed."""
    normalise_weights: bool = True
    """Whether the chosen experts' weights are divided by their sum."""
    weights_scale: float = 1.0
    weights_before_experts: bool = False
    """Whether the weight multiplies the expert's input rather than its output (Llama 4)."""
    router_before_attention: bool = False
    """Whether the router reads the layer's input rather than the attention's output (SmallThinker)."""
    router_bias: bool = False
    selection_bias: bool = False
    """Whether ``exp_probs_b`` is added to the scores for the selection only (DeepSeek-V3)."""
    n_expert_groups: int = 0
    n_group_used: int = 0

    gated_experts: bool = True
    """Whether feed-forward networks, dense and expert, have a gate matrix besides up and down."""
    fused_gate_up: bool = False
    """Whether gate and up are one tensor, ``ffn_gate_up_exps``."""
    expert_bias: bool = False
    n_expert_shared: int = 0
    shared_gate: bool = False
    """Whether the shared expert has a sigmoid gate of its own (Qwen2-MoE)."""
    shared_ff_key: bool = False
    """Whether the shared expert's width has a key of its own, rather than following from the count."""

    n_layer_dense: int = 0
    """Leading layers with an ordinary feed-forward network."""
    moe_every: int = 1
    """After the leading layers, every how many layers one has experts: the last of each run."""

    n_layer_nextn: int = 0
    """Layers after the others that predict one token further (multi-token prediction), each with experts."""

    mla: bool = False
    """Multi-head latent attention in the absorbed form (one key-value head in the cache)."""
    latent_kv: bool = False
    """Low-rank queries, keys and values (DeepSeek); with ``mla`` false they are expanded before attention."""
    qkv_bias: bool = False
    attention_bias: bool = False
    """Bias of the attention's output projection."""
    attention_sinks: bool = False
    qk_norm: str = ""
    """``""``, ``"head"`` (one norm shared by all heads) or ``"full"`` (across all heads)."""
    ffn_norm_name: str = "ffn_norm"
    output_norm_name: str = "output_norm"
    sliding_window: int = 0

    mixer: Mixer = Mixer.NONE
    attention_every: int = 1
    """In a hybrid model, every how many layers one has attention: the last of each run."""

    encoder: bool = False
    """A bidirectional encoder with layer norms after each block, for embeddings; it generates no text."""
    add_bos: bool = False

    def is_moe(self, layer: int) -> bool:
        """Return whether a layer has routed experts."""
        past = layer - self.n_layer_dense
        return self.n_expert > 0 and past >= 0 and (past + 1) % self.moe_every == 0

    def has_attention(self, layer: int) -> bool:
        """Return whether a layer has attention, rather than the recurrent mixer."""
        return self.mixer is Mixer.NONE or (layer + 1) % self.attention_every == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with routed experts."""
        return tuple(layer for layer in range(self.n_layer) if self.is_moe(layer))

    # Widths that follow from the sizes above.

    @property
    def n_head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_rope(self) -> int:
        """Dimensions of a head that are rotated; with latent attention a part of it of its own."""
        return self.n_head_dim

    @property
    def n_lora(self) -> int:
        return self.n_embd // 2

    @property
    def n_inner(self) -> int:
        return 2 * self.n_embd

    @property
    def n_ff_dense(self) -> int:
        return self.n_ff if self.expert_ff_key or not self.n_expert else self.n_ff_expert

    @property
    def n_ff_shared(self) -> int:
        return self.n_ff_expert * self.n_expert_shared


N_SSM_CONV = 4
N_MAMBA_STATE, N_MAMBA_STEP_RANK = 16, 8
N_MAMBA2_STATE, N_MAMBA2_HEAD = 128, 4  # CUDA's scan knows states of 128 and 256 only
N_SHORTCONV = 3
RMS_EPSILON = 1e-5


def hyperparameters(arch: Architecture) -> dict[str, Value]:
    """Return the model's own GGUF keys, without the architecture's name in front."""
    head_kv: int | list[int] = arch.n_head_kv
    if arch.mixer is not Mixer.NONE:
        head_kv = [arch.n_head_kv if arch.has_attention(layer) else 0 for layer in range(arch.n_layer)]
    elif arch.latent_kv:
        head_kv = 1 if arch.mla else arch.n_head
    keys: dict[str, Value] = {
        "context_length": arch.n_ctx_train,
        "embedding_length": arch.n_embd,
        "block_count": arch.n_layer + arch.n_layer_nextn,
        "feed_forward_length": arch.n_ff_dense,
        "attention.head_count": arch.n_head,
        "attention.head_count_kv": head_kv,
        "rope.dimension_count": arch.n_rope,
        "rope.freq_base": 10000.0,
    }
    if arch.encoder:
        keys |= {"attention.layer_norm_epsilon": RMS_EPSILON, "attention.causal": False, "pooling_type": 1}
    else:
        keys["attention.layer_norm_rms_epsilon"] = RMS_EPSILON
    if arch.sliding_window:
        keys["attention.sliding_window"] = arch.sliding_window
    if arch.n_layer_nextn:
        keys["nextn_predict_layers"] = arch.n_layer_nextn
    if arch.latent_kv:
        head_k = arch.n_head_dim + arch.n_rope
        keys |= {"attention.q_lora_rank": arch.n_lora, "attention.kv_lora_rank": arch.n_lora}
        if arch.mla:
            keys |= {
                "attention.key_length": arch.n_lora + arch.n_rope,
                "attention.value_length": arch.n_lora,
                "attention.key_length_mla": head_k,
                "attention.value_length_mla": arch.n_head_dim,
            }
        else:
            keys |= {"attention.key_length": head_k, "attention.value_length": arch.n_head_dim}
    if arch.n_expert:
        keys |= _expert_hyperparameters(arch)
    match arch.mixer:
        case Mixer.MAMBA:
            keys |= {
                "ssm.conv_kernel": N_SSM_CONV,
                "ssm.inner_size": arch.n_inner,
                "ssm.state_size": N_MAMBA_STATE,
                "ssm.time_step_rank": N_MAMBA_STEP_RANK,
            }
        case Mixer.MAMBA2:
            keys |= {
                "ssm.conv_kernel": N_SSM_CONV,
                "ssm.inner_size": arch.n_inner,
                "ssm.state_size": N_MAMBA2_STATE,
                "ssm.time_step_rank": N_MAMBA2_HEAD,
                "ssm.group_count": 1,
            }
        case Mixer.SHORTCONV:
            keys["shortconv.l_cache"] = N_SHORTCONV
    if arch.gguf_name.startswith("granite"):
        keys |= {"logit_scale": 1.25, "embedding_scale": 1.5, "residual_scale": 0.8}
        keys["attention.scale"] = 1 / math.sqrt(arch.n_head_dim)
    return keys


def _expert_hyperparameters(arch: Architecture) -> dict[str, Value]:
    keys: dict[str, Value] = {"expert_count": arch.n_expert, "expert_used_count": arch.n_expert_used}
    if arch.expert_ff_key:
        keys["expert_feed_forward_length"] = arch.n_ff_expert
    if arch.gating_key:
        keys |= {"expert_gating_func": arch.gating.value, "expert_weights_norm": arch.normalise_weights}
    if arch.weights_scale != 1.0:
        keys["expert_weights_scale"] = arch.weights_scale
    if arch.n_expert_groups:
        keys |= {"expert_group_count": arch.n_expert_groups, "expert_group_used_count": arch.n_group_used}
    if arch.n_expert_shared and arch.shared_ff_key:
        keys["expert_shared_feed_forward_length"] = arch.n_ff_shared
    elif arch.n_expert_shared:
        keys["expert_shared_count"] = arch.n_expert_shared
    if arch.n_layer_dense:
        keys["leading_dense_block_count"] = arch.n_layer_dense
    if arch.gguf_name == "llama4":
        keys["interleave_moe_layer_step"] = arch.moe_every
    elif arch.encoder:
        keys["moe_every_n_layers"] = arch.moe_every
    return keys


def tensors(arch: Architecture, plain: tuple[bool, ...], router_gain: float) -> Iterator[Tensor]:
    """Yield every tensor of the model, in the order of the file.

    Parameters
    ----------
    arch
        The architecture with its sizes.
    plain
        For each token of the vocabulary whether the model may generate it; the output rows of the others are
        zero, so that their logit is 0 and stays far below the largest.
    router_gain
        Standard deviation of the router's logits for a normed input.
    """
    n_vocab = len(plain)
    yield Tensor("token_embd.weight", (n_vocab, arch.n_embd), Kind.MATRIX, _normal(1.0))
    if arch.encoder:
        yield Tensor("token_types.weight", (1, arch.n_embd), Kind.EXACT, _normal(0.1))
        yield from _norm("token_embd_norm", arch.n_embd, bias=True)
    else:
        yield Tensor("output.weight", (n_vocab, arch.n_embd), Kind.MATRIX, _output(arch.n_embd, plain))
        yield from _norm(arch.output_norm_name, arch.n_embd)
    for layer in range(arch.n_layer + arch.n_layer_nextn):
        block = f"blk.{layer}."
        if layer >= arch.n_layer:
            yield _matrix(block + "nextn.eh_proj", arch.n_embd, 2 * arch.n_embd)
            for name in ("enorm", "hnorm", "shared_head_norm"):
                yield from _norm(f"{block}nextn.{name}", arch.n_embd)
        if not arch.encoder:
            yield from _norm(block + "attn_norm", arch.n_embd)
        if not arch.has_attention(layer):
            yield from _MIXERS[arch.mixer](arch, block)
        elif arch.latent_kv:
            yield from _latent_attention(arch, block)
        else:
            yield from _attention(arch, block)
        if arch.encoder:
            yield from _norm(block + "attn_output_norm", arch.n_embd, bias=True)
            yield from _norm(block + "layer_output_norm", arch.n_embd, bias=True)
        else:
            yield from _norm(block + arch.ffn_norm_name, arch.n_embd)
        if arch.is_moe(layer):
            yield from _experts(arch, block, router_gain)
        else:
            yield from _dense(arch, block)


def _normal(std: float, mean: float = 0.0) -> Init:
    def init(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return values

    return init


def _output(n_embd: int, plain: tuple[bool, ...]) -> Init:
    def init(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        values = _normal(2.0 / math.sqrt(n_embd))(rng, shape)
        values[~np.array(plain)] = 0.0
        return values

    return init


def _router(gain: float) -> Init:
    """Draw rows of equal length, so that no expert is chosen more often for its length alone."""

    def init(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        values = _normal(1.0)(rng, shape)
        values *= np.float32(gain) / np.linalg.norm(values, axis=1, keepdims=True)
        return values

    return init


def _decay(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw state-space decays, negative as llama.cpp stores them."""
    return -rng.uniform(1.0, 8.0, shape).astype(np.float32)


def _step(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw time-step biases whose softplus lies between 0.01 and 0.1."""
    step = rng.uniform(0.01, 0.1, shape)
    return np.log(np.expm1(step)).astype(np.float32)


def _matrix(name: str, rows: int, columns: int, *, gain: float = 1.0) -> Tensor:
    return Tensor(name + ".weight", (rows, columns), Kind.MATRIX, _normal(gain / math.sqrt(columns)))


def _bias(name: str, *shape: int, std: float = 0.1) -> Tensor:
    return Tensor(name + ".bias", shape, Kind.EXACT, _normal(std))


def _norm(name: str, width: int, *, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(name + ".weight", (width,), Kind.EXACT, _normal(0.1, mean=1.0))
    if bias:
        yield _bias(name, width, std=0.05)


def _branch_gain(arch: Architecture) -> float:
    """Keep what all the branches add to the residual stream of the size of the embeddings."""
    return 1.0 / math.sqrt(arch.n_layer)


def _attention(arch: Architecture, block: str) -> Iterator[Tensor]:
    width, width_kv = arch.n_head * arch.n_head_dim, arch.n_head_kv * arch.n_head_dim
    for name, rows, gain in (("attn_q", width, 1.5), ("attn_k", width_kv, 1.5), ("attn_v", width_kv, 1.0)):
        yield _matrix(block + name, rows, arch.n_embd, gain=gain)
        if arch.qkv_bias:
            yield _bias(block + name, rows)
    yield _matrix(block + "attn_output", arch.n_embd, width, gain=2 * _branch_gain(arch))
    if arch.attention_bias:
        yield _bias(block + "attn_output", arch.n_embd)
    if arch.attention_sinks:
        yield Tensor(block + "attn_sinks.weight", (arch.n_head,), Kind.EXACT, _normal(1.0))
    if arch.qk_norm:
        full = arch.qk_norm == "full"
        yield from _norm(block + "attn_q_norm", width if full else arch.n_head_dim)
        yield from _norm(block + "attn_k_norm", width_kv if full else arch.n_head_dim)


def _latent_attention(arch: Architecture, block: str) -> Iterator[Tensor]:
    head, rope, lora = arch.n_head_dim, arch.n_rope, arch.n_lora
    yield _matrix(block + "attn_q_a", lora, arch.n_embd)
    yield from _norm(block + "attn_q_a_norm", lora)
    yield _matrix(block + "attn_q_b", arch.n_head * (head + rope), lora, gain=1.5)
    yield _matrix(block + "attn_kv_a_mqa", lora + rope, arch.n_embd, gain=1.5)
    yield from _norm(block + "attn_kv_a_norm", lora)
    if arch.mla:
        # keys are kept compressed, so k_b maps queries to the latent space
        spread = _normal(1.0 / math.sqrt(lora))
        yield Tensor(block + "attn_k_b.weight", (arch.n_head, lora, head), Kind.MATRIX, spread)
        yield Tensor(block + "attn_v_b.weight", (arch.n_head, head, lora), Kind.MATRIX, spread)
    else:
        yield _matrix(block + "attn_kv_b", arch.n_head * 2 * head, lora)
    yield _matrix(block + "attn_output", arch.n_embd, arch.n_head * head, gain=2 * _branch_gain(arch))


def _mamba(arch: Architecture, block: str) -> Iterator[Tensor]:
    inner, state, rank = arch.n_inner, N_MAMBA_STATE, N_MAMBA_STEP_RANK
    yield _matrix(block + "ssm_in", 2 * inner, arch.n_embd)
    yield Tensor(block + "ssm_conv1d.weight", (inner, N_SSM_CONV), Kind.EXACT, _normal(0.5))
    yield _bias(block + "ssm_conv1d", inner)
    yield _matrix(block + "ssm_x", rank + 2 * state, inner)
    yield from _norm(block + "ssm_dt_norm", rank)
    yield from _norm(block + "ssm_b_norm", state)
    yield from _norm(block + "ssm_c_norm", state)
    yield _matrix(block + "ssm_dt", inner, rank)
    yield Tensor(block + "ssm_dt.bias", (inner,), Kind.EXACT, _step)
    yield Tensor(block + "ssm_a", (inner, state), Kind.EXACT, _decay)
    yield Tensor(block + "ssm_d", (inner,), Kind.EXACT, _normal(0.1, mean=1.0))
    yield _matrix(block + "ssm_out", arch.n_embd, inner, gain=2 * _branch_gain(arch))


def _mamba2(arch: Architecture, block: str) -> Iterator[Tensor]:
    inner, state, heads = arch.n_inner, N_MAMBA2_STATE, N_MAMBA2_HEAD
    yield _matrix(block + "ssm_in", 2 * inner + 2 * state + heads, arch.n_embd)
    yield Tensor(block + "ssm_conv1d.weight", (inner + 2 * state, N_SSM_CONV), Kind.EXACT, _normal(0.5))
    yield _bias(block + "ssm_conv1d", inner + 2 * state)
    yield Tensor(block + "ssm_dt.bias", (heads,), Kind.EXACT, _step)
    yield Tensor(block + "ssm_a", (heads, 1), Kind.EXACT, _decay)
    yield Tensor(block + "ssm_d", (heads, 1), Kind.EXACT, _normal(0.1, mean=1.0))
    yield Tensor(block + "ssm_norm.weight", (1, inner), Kind.EXACT, _normal(0.1, mean=1.0))
    yield _matrix(block + "ssm_out", arch.n_embd, inner, gain=_branch_gain(arch))


def _shortconv(arch: Architecture, block: str) -> Iterator[Tensor]:
    yield _matrix(block + "shortconv.in_proj", 3 * arch.n_embd, arch.n_embd)
    yield Tensor(block + "shortconv.conv.weight", (arch.n_embd, N_SHORTCONV), Kind.EXACT, _normal(0.6))
    yield _matrix(block + "shortconv.out_proj", arch.n_embd, arch.n_embd, gain=_branch_gain(arch))


_MIXERS = {Mixer.MAMBA: _mamba, Mixer.MAMBA2: _mamba2, Mixer.SHORTCONV: _shortconv}


def _dense(arch: Architecture, block: str, suffix: str = "", width: int = 0) -> Iterator[Tensor]:
    width = width or arch.n_ff_dense
    if arch.gated_experts:
        yield _matrix(block + "ffn_gate" + suffix, width, arch.n_embd)
    yield _matrix(block + "ffn_up" + suffix, width, arch.n_embd)
    yield _matrix(block + "ffn_down" + suffix, arch.n_embd, width, gain=1.5 * _branch_gain(arch))


def _experts(arch: Architecture, block: str, router_gain: float) -> Iterator[Tensor]:
    n, width, n_embd = arch.n_expert, arch.n_ff_expert, arch.n_embd

    def stack(name: str, rows: int, columns: int, gain: float = 1.0) -> Iterator[Tensor]:
        init = _normal(gain / math.sqrt(columns))
        yield Tensor(f"{block}{name}.weight", (n, rows, columns), Kind.EXPERT, init)
        if arch.expert_bias:
            yield _bias(block + name, n, rows)

    yield Tensor(block + "ffn_gate_inp.weight", (n, n_embd), Kind.EXACT, _router(router_gain))
    if arch.router_bias:
        yield _bias(block + "ffn_gate_inp", n, std=0.2 * router_gain)
    if arch.selection_bias:
        yield _bias(block + "exp_probs_b", n)
    if arch.fused_gate_up:
        yield from stack("ffn_gate_up_exps", 2 * width, n_embd)
    else:
        if arch.gated_experts:
            yield from stack("ffn_gate_exps", width, n_embd)
        yield from stack("ffn_up_exps", width, n_embd)
    yield from stack("ffn_down_exps", n_embd, width, gain=2.5 * _branch_gain(arch))
    if arch.n_expert_shared:
        yield from _dense(arch, block, "_shexp", arch.n_ff_shared)
        if arch.shared_gate:
            gate = _normal(1.0 / math.sqrt(n_embd))
            yield Tensor(block + "ffn_gate_inp_shexp.weight", (n_embd,), Kind.EXACT, gate)


_DEEPSEEK = Architecture(
    "deepseek2",
    n_head_kv=4,
    n_expert=16,
    n_expert_used=4,
    gating_key=True,
    n_expert_shared=2,
    n_layer_dense=1,
    latent_kv=True,
    add_bos=True,
)

ARCHITECTURES: MappingProxyType[str, Architecture] = MappingProxyType(
    {
        "gpt-oss": Architecture(
            "gpt-oss",
            n_expert=16,
            n_expert_used=4,
            gating=Gating.SOFTMAX_WEIGHT,
            normalise_weights=False,
            router_bias=True,
            expert_bias=True,
            qkv_bias=True,
            attention_bias=True,
            attention_sinks=True,
            ffn_norm_name="post_attention_norm",
            sliding_window=128,
        ),
        "llama": Architecture("llama", expert_ff_key=False, add_bos=True),  # Mixtral
        "llama-dense": Architecture("llama", n_expert=0, n_expert_used=0, add_bos=True),
        "llama4": Architecture(
            "llama4",
            n_expert_used=1,
            gating=Gating.SIGMOID,
            normalise_weights=False,
            weights_before_experts=True,
            n_expert_shared=1,
            moe_every=2,
            add_bos=True,
        ),
        "qwen2moe": Architecture(
            "qwen2moe",
            n_expert=16,
            n_expert_used=4,
            normalise_weights=False,
            n_expert_shared=1,
            shared_gate=True,
            shared_ff_key=True,
            qkv_bias=True,
        ),
        "qwen3moe": Architecture("qwen3moe", n_expert=16, n_expert_used=4, qk_norm="head"),
        "qwen3moe-300": Architecture(
            "qwen3moe", n_layer=2, n_embd=128, n_expert=300, n_expert_used=8, n_ff_expert=16, qk_norm="head"
        ),
        "olmoe": Architecture(
            "olmoe",
            n_head_kv=4,
            n_expert=16,
            n_expert_used=4,
            expert_ff_key=False,
            normalise_weights=False,
            qk_norm="full",
        ),
        "deepseek2-v2": replace(_DEEPSEEK, normalise_weights=False, weights_scale=2.0),
        "deepseek2-v2-fused": replace(
            _DEEPSEEK, normalise_weights=False, weights_scale=2.0, fused_gate_up=True
        ),
        "deepseek2-v3": replace(
            _DEEPSEEK,
            gating=Gating.SIGMOID,
            weights_scale=2.5,
            selection_bias=True,
            n_expert_groups=4,
            n_group_used=2,
            n_expert_shared=1,
            mla=True,
        ),
        "glm4moe": Architecture(
            "glm4moe",
            n_expert=16,
            n_expert_used=4,
            gating=Gating.SIGMOID,
            gating_key=True,
            selection_bias=True,
            n_expert_shared=1,
            n_layer_dense=1,
            qkv_bias=True,
            qk_norm="head",
            ffn_norm_name="post_attention_norm",
        ),
        "granitemoe": Architecture(
            "granitemoe",
            n_expert=16,
            n_expert_used=4,
            expert_ff_key=False,
            n_expert_shared=1,
            shared_ff_key=True,
        ),
        "smallthinker": Architecture(
            "smallthinker",
            n_expert=16,
            n_expert_used=4,
            gating=Gating.SIGMOID,
            gating_key=True,
            router_before_attention=True,
        ),
        "jamba": Architecture(
            "jamba",
            n_layer=6,
            normalise_weights=False,
            expert_ff_key=False,
            moe_every=2,
            mixer=Mixer.MAMBA,
            attention_every=3,
        ),
        "granitehybrid": Architecture(
            "granitehybrid",
            n_expert=16,
            n_expert_used=4,
            expert_ff_key=False,
            n_expert_shared=1,
            shared_ff_key=True,
            mixer=Mixer.MAMBA2,
            attention_every=2,
        ),
        "lfm2moe": Architecture(
            "lfm2moe",
            n_layer=5,
            n_expert=16,
            n_expert_used=4,
            gating=Gating.SIGMOID,
            gating_key=True,
            selection_bias=True,
            n_layer_dense=1,
            qk_norm="head",
            output_norm_name="token_embd_norm",
            mixer=Mixer.SHORTCONV,
            attention_every=2,
        ),
        "nomic-bert-moe": Architecture(
            "nomic-bert-moe",
            n_head_kv=4,
            normalise_weights=False,
            expert_ff_key=False,
            gated_experts=False,
            moe_every=2,
            qkv_bias=True,
            attention_bias=True,
            encoder=True,
        ),
    }
)
"""One entry for each variant worth telling apart, by the name that :func:`write_model` takes."""
