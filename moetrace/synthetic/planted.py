"""Models whose routing is known in advance, to hold an analysis against.

:func:`write_planted` writes a model of Mixtral's architecture in which routing is random except for what is asked
for: an expert that fires on chosen tokens, a chain of experts in which one switches the next on, experts that are
dead, experts that are equal up to the order of their neurons, routing by position alone, a change of routing at
a position.

How: a few dimensions of the residual stream are reserved. Attention and experts write nothing there but what is
planted; routers read them with weights far above the rest. The rest of each router reads a block of embedding
dimensions of its own, so that routing in two layers is independent where nothing is planted: it then depends on
the token id alone, and on different ids is independent. Text in which no id repeats (:func:`distinct_tokens`) is
routed at random.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import UsageError
from moetrace.synthetic.architectures import ARCHITECTURES, Array
from moetrace.synthetic.tokenizer import BOS, CONTROL_TOKENS, N_VOCAB_DEFAULT, vocabulary
from moetrace.synthetic.writer import write_model

Expert = tuple[int, int]  # layer, expert

# Reserved dimensions; from _FREE on: one for each set of tokens and for each link of the circuit.
_CONSTANT, _FIRST, _POSITION, _FREE = 0, 1, 2, 3
_N_RESERVED, _N_SCRATCH = 16, 16

_LEVEL = 4.0  # of the constant, and of a token set's dimension: +4 for its tokens, −4 for others
_LOGIT = 15.0  # of a planted expert at a raw level of 4; random logits have a standard deviation of 2
_WRITTEN = 4.0  # what an expert of a circuit writes if it has all the mixing weight
_REACH = 40.0  # what position 0 has in the position's dimension; position i has 40/(i + 1)


@dataclass(frozen=True)
class Planted:
    """A model and what is known about it.

    Attributes
    ----------
    path
        The GGUF file.
    n_layer, n_expert, n_expert_used, n_vocab
        Sizes; every layer has experts.
    fires_on
        (layer, expert) -> ids of the tokens at which it is chosen, and at no others.
    circuit
        (layer, expert) in order: each is chosen where the one before was, and nowhere else.
    dead
        Experts that are never chosen.
    twins
        (layer, expert, expert): the second computes what the first does, with its neurons in another order.
    """

    path: Path
    n_layer: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    fires_on: Mapping[Expert, tuple[int, ...]]
    circuit: tuple[Expert, ...]
    dead: tuple[Expert, ...]
    twins: tuple[tuple[int, int, int], ...]


def digit_tokens(n_vocab: int = N_VOCAB_DEFAULT) -> tuple[int, ...]:
    """Ids of the tokens that are digits, with or without a space in front."""
    return tuple(
        i
        for i, token in enumerate(vocabulary(n_vocab).tokens)
        if (token.isascii() and token.isdigit()) or (token[:1] == "Ġ" and token[1:].isdecimal())
    )


def distinct_tokens(
    n_prompts: int, n_tokens: int, n_vocab: int = N_VOCAB_DEFAULT, *, begin: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """Prompts of token ids in which no id occurs twice, in any of them: ``id`` and ``tokens`` for a capture.

    With ``begin`` the beginning-of-sequence token (which does repeat) stands before the ``n_tokens``.

    Raises
    ------
    UsageError
        If the vocabulary is too small for that.
    """
    known = vocabulary(n_vocab)
    control = {known.id(token) for token in CONTROL_TOKENS}
    usable = np.array([i for i in range(n_vocab) if i not in control])
    if n_prompts * n_tokens > usable.size:
        raise UsageError(
            f"{n_prompts} × {n_tokens} tokens without repetition need a larger vocabulary than {n_vocab}",
            fix=f"use n_vocab={n_prompts * n_tokens + len(control) + 256}",
        )
    drawn = np.random.default_rng(seed).permutation(usable)[: n_prompts * n_tokens].reshape(n_prompts, -1)
    first = [known.id(BOS)] if begin else []
    return [{"id": f"p{i:04d}", "tokens": [*first, *row.tolist()]} for i, row in enumerate(drawn)]


def write_planted(
    path: str | os.PathLike[str],
    *,
    n_layer: int = 4,
    n_expert: int = 16,
    n_expert_used: int = 2,
    n_vocab: int = N_VOCAB_DEFAULT,
    fires_on: Mapping[Expert, Iterable[int]] | None = None,
    circuit: Sequence[Expert] = (),
    dead: Sequence[Expert] = (),
    twins: Sequence[tuple[int, int, int]] = (),
    by_position: bool = False,
    phase_at: int | None = None,
    seed: int = 0,
    **sizes: int,
) -> Planted:
    """Write a model with random routing and what is planted in it.

    Parameters
    ----------
    path
        The GGUF file to write.
    n_layer, n_expert, n_expert_used, n_vocab
        Sizes. Experts that are planted at one token in one layer must be no more than ``n_expert_used``.
    fires_on
        (layer, expert) -> token ids: chosen at these tokens, never at others.
    circuit
        (layer, expert) of ascending layers. Where the first is chosen it writes into a dimension that makes the
        second chosen, and so on; without that they are never chosen. The first fires on the tokens that
        ``fires_on`` gives it, else on a random 30 % of the vocabulary. Ablating one stops those after it.
    dead
        Experts whose router logit is far below all others.
    twins
        (layer, a, b): b gets a's weights, neurons permuted. Their routers stay different.
    by_position
        Routing follows from the position alone in all layers: expert n is nearest to position 2ⁿ^½. The first
        token must be the beginning-of-sequence token, which the model's tokenizer adds.
    phase_at
        From this position on the second half of a layer's experts is chosen, before it the first; within the
        half at random. The first token as for ``by_position``.
    seed
        Of all random weights.
    sizes
        Others of :func:`moetrace.synthetic.write_model`: ``n_embd`` (128 if not given), ``n_ff_expert``, …

    Raises
    ------
    UsageError
        If what is planted does not fit together, or into the reserved dimensions.
    """
    rng = np.random.default_rng([seed, 0x9E37])
    links: list[Expert] = [(layer, expert) for layer, expert in circuit]
    firing: dict[Expert, tuple[int, ...]] = {e: tuple(sorted(set(t))) for e, t in (fires_on or {}).items()}
    if links and links[0] not in firing:
        firing[links[0]] = tuple(np.flatnonzero(rng.random(n_vocab) < 0.3).tolist())
    _check(n_layer, n_expert, firing, links, list(dead), list(twins), by_position, phase_at)
    columns = {expert: _FREE + i for i, expert in enumerate(firing)}
    written = {link: _FREE + len(firing) + i for i, link in enumerate(links[:-1])}
    plan = _Plan(
        n_layer=n_layer,
        first=vocabulary(n_vocab).id(BOS),
        firing=firing,
        columns=columns,
        links=tuple(links),
        written=written,
        dead=tuple((layer, expert) for layer, expert in dead),
        twins=tuple((layer, a, b) for layer, a, b in twins),
        by_position=by_position,
        phase_at=phase_at,
        seed=seed,
    )
    arch = replace(ARCHITECTURES["llama"], n_embd=128, n_ff_expert=32)
    file = write_model(
        path,
        arch,
        n_layer=n_layer,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_vocab=n_vocab,
        seed=seed,
        overrides=plan,
        **sizes,  # type: ignore[arg-type]
    )
    return Planted(
        file,
        n_layer,
        n_expert,
        n_expert_used,
        n_vocab,
        firing,
        tuple(links),
        plan.dead,
        plan.twins,
    )


def _check(
    n_layer: int,
    n_expert: int,
    firing: Mapping[Expert, tuple[int, ...]],
    links: list[Expert],
    dead: list[Expert],
    twins: list[tuple[int, int, int]],
    by_position: bool,
    phase_at: int | None,
) -> None:
    planted = [*firing, *links[1:], *dead]
    every = [*planted, *((layer, e) for layer, a, b in twins for e in (a, b))]
    rules = {
        "an expert is planted twice": len(set(planted)) != len(planted),
        "a layer or expert is not in the model": any(
            not (0 <= layer < n_layer and 0 <= expert < n_expert) for layer, expert in every
        ),
        "a circuit goes from lower layers to higher ones": any(a[0] >= b[0] for a, b in pairwise(links)),
        f"no more than {_N_RESERVED - _FREE} token sets and links": len(firing) + max(len(links) - 1, 0)
        > _N_RESERVED - _FREE,
        "routing by position leaves nothing else to plant in routers": (by_position or phase_at is not None)
        and (bool(planted) or (by_position and phase_at is not None)),
        "a change at a position needs one before it": phase_at is not None and phase_at < 1,
    }
    for rule, broken in rules.items():
        if broken:
            raise UsageError("this cannot be planted", why=rule)


@dataclass(frozen=True)
class _Plan:
    """The tensors' replacements: a function of name and drawn values, as ``write_model`` takes it."""

    n_layer: int
    first: int
    firing: Mapping[Expert, tuple[int, ...]]
    columns: Mapping[Expert, int]
    links: tuple[Expert, ...]
    written: Mapping[Expert, int]
    dead: tuple[Expert, ...]
    twins: tuple[tuple[int, int, int], ...]
    by_position: bool
    phase_at: int | None
    seed: int

    def __call__(self, name: str, values: Array) -> NDArray[Any] | None:
        if name == "token_embd.weight":
            return self._embedding(values)
        if name == "output.weight":  # what is planted is not to decide the text
            values[:, :_N_RESERVED] = 0.0
            return values
        if not name.startswith("blk."):
            return None
        layer, kind = int(name.split(".")[1]), name.split(".")[2]
        match kind:
            case "ffn_gate_inp":
                return self._router(layer, values)
            case "attn_norm" | "ffn_norm":
                values[:_N_RESERVED] = 1.0
                return values
            case "attn_q" if layer == 0 and self._uses_position:
                return np.zeros_like(values)  # every key gets the same attention
            case "attn_v" if layer == 0 and self._uses_position:
                values[0] = 0.0
                values[0, _FIRST] = 1.0
                return values
            case "attn_output":
                values[: values.shape[0] - _N_SCRATCH] = 0.0
                if layer == 0 and self._uses_position:
                    values[:, 0] = 0.0  # only the first value of the first head carries the position
                    values[_POSITION, 0] = _REACH / self._first_normed(values.shape[0])
                return values
            case "ffn_gate_exps" | "ffn_up_exps":
                for link, expert in self.links[:-1]:
                    if link == layer:
                        values[expert, 0] = 0.0
                        values[expert, 0, _CONSTANT] = 1.0
                return self._alike(layer, values, axis=0)
            case "ffn_down_exps":
                values[:, : values.shape[1] - _N_SCRATCH] = 0.0
                for (link, expert), dimension in self.written.items():
                    if link == layer:
                        values[expert, :, 0] = 0.0
                        # SwiGLU of two equal inputs z is z·silu(z), and z is the normed constant, about 3.7
                        values[expert, dimension, 0] = _WRITTEN / 13.0
                return self._alike(layer, values, axis=1)
        return None

    @property
    def _uses_position(self) -> bool:
        return self.by_position or self.phase_at is not None

    def _first_normed(self, n_embd: int) -> float:
        """What the first token's own dimension is after the norm: everything else in it is small."""
        return float(np.sqrt(n_embd) * _LEVEL / np.sqrt(2 * _LEVEL**2))

    def _embedding(self, values: Array) -> Array:
        values[:, :_N_RESERVED] = 0.0
        values[:, _CONSTANT] = _LEVEL
        for expert, column in self.columns.items():
            values[:, column] = -_LEVEL
            values[list(self.firing[expert]), column] = _LEVEL
        if self._uses_position:
            values[self.first] = 0.0
            values[self.first, [_CONSTANT, _FIRST]] = _LEVEL
        return values

    def _router(self, layer: int, values: Array) -> Array:
        n_expert, n_embd = values.shape
        gain = float(np.linalg.norm(values[0]))
        width = (n_embd - _N_RESERVED - _N_SCRATCH) // self.n_layer
        start = _N_RESERVED + layer * width
        out = np.zeros_like(values)
        out[:, start : start + width] = values[:, start : start + width]
        out *= gain / np.linalg.norm(out, axis=1, keepdims=True)
        step = _LOGIT / _LEVEL
        if self.by_position:
            # The nearest centre wins: −(s − c)² + s² = 2cs − c², in units in which the constant is 1.
            centre = _REACH / (1.0 + 2.0 ** (np.arange(n_expert) / 2))
            out[:] = 0.0
            out[:, _POSITION], out[:, _CONSTANT] = 2 * centre, -(centre**2) / _LEVEL
            return out
        if self.phase_at is not None:
            # Half-way between the last position before and the first one after.
            edge = _REACH / (self.phase_at + 0.5)
            steep = 4 * _LOGIT / (_REACH / self.phase_at - _REACH / (self.phase_at + 1))
            sign = np.where(np.arange(n_expert) < n_expert // 2, 1.0, -1.0)
            out[:, _POSITION], out[:, _CONSTANT] = sign * steep, -sign * steep * edge / _LEVEL
        for (where, expert), column in self.columns.items():
            if where == layer:
                out[expert] = 0.0
                out[expert, column] = step
        for before, (where, expert) in pairwise(self.links):
            if where == layer:
                out[expert] = 0.0
                # Far above the others, and not so far that their softmax underflows.
                out[expert, self.written[before]] = 4 * _LOGIT / _WRITTEN
                out[expert, _CONSTANT] = -step
        for where, expert in self.dead:
            if where == layer:
                out[expert] = 0.0
                out[expert, _CONSTANT] = -4 * step
        return out

    def _alike(self, layer: int, values: Array, axis: int) -> Array:
        """Copy twins' weights; ``axis`` is the neurons' axis of one expert's matrix."""
        for where, a, b in self.twins:
            if where == layer:
                order = np.random.default_rng([self.seed, layer, a, b]).permutation(values.shape[1 + axis])
                values[b] = np.take(values[a], order, axis=axis)
        return values
