"""The expert matrices of a model file, expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import InputError
from moetrace.model.file import ModelFile

Activation = Literal["silu", "gelu", "relu", "relu_sqr", "swiglu_oai"]

# What llama.cpp's build_moe_ffn calls with something else than SiLU (src/models/*.cpp).
_ACTIVATIONS: dict[str, Activation] = {
    "gemma4": "gelu",
    "gpt-oss": "swiglu_oai",
    "grok": "gelu",
    "minimax-m3": "swiglu_oai",
    "nemotron_h_moe": "relu_sqr",
    "nomic-bert-moe": "gelu",
    "smallthinker": "relu",
}
# Here the experts read something else than the router, or compute something that none of the above is.
_ROUTER_READS_ELSE = (
    "arctic",
    "gemma4",
    "glm5-next",
    "grovemoe",
    "kimi-k3",
    "nemotron_h_moe",
    "smallthinker",
)


def weights_before(architecture: str) -> bool:
    """Whether a model weighs what its experts take, not what they make."""
    return architecture == "llama4"


@dataclass(frozen=True)
class Expert:
    """One expert, dequantised to float32: F hidden neurons, D the width of the model.

    Attributes
    ----------
    up, gate
        (F, D); ``gate`` is None in models whose experts have none.
    down
        (D, F).
    up_bias, gate_bias, down_bias
        (F,), (F,), (D,), or None.
    """

    up: NDArray[np.float32]
    down: NDArray[np.float32]
    gate: NDArray[np.float32] | None = None
    up_bias: NDArray[np.float32] | None = None
    gate_bias: NDArray[np.float32] | None = None
    down_bias: NDArray[np.float32] | None = None

    @property
    def n_neuron(self) -> int:
        """F."""
        return int(self.up.shape[0])

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return sum(part.nbytes for part in vars(self).values() if part is not None)


class LayerExperts(Sequence[Expert]):
    """The experts of one layer. Each is dequantised when it is asked for, and none is kept.

    Attributes
    ----------
    layer
        llama.cpp's number.
    activation
        What stands between up and down. "silu", "gelu" and "relu" multiply with the gate where there is one.
    weights_before
        Whether the mixing weight multiplies the expert's input rather than its output (Llama 4).
    reads_gate_input
        Whether the experts read what the router reads. If not, their outputs do not follow from a trace.

    Raises
    ------
    InputError
        If the layer has no experts, or has them in a form that is not known.
    """

    def __init__(self, model: ModelFile, layer: int) -> None:
        self._model = model
        self.layer = layer
        arch = model.architecture
        self.activation: Activation = _ACTIVATIONS.get(arch, "silu")
        self.weights_before = weights_before(arch)
        self.reads_gate_input = arch not in _ROUTER_READS_ELSE and not model.field("{arch}.swiglu_clamp_exp")
        self._block = f"blk.{layer}."
        self._fused = model.has_tensor(f"{self._block}ffn_gate_up_exps.weight")
        first = f"{self._block}ffn_{'gate_up' if self._fused else 'up'}_exps.weight"
        for name in (first, f"{self._block}ffn_down_exps.weight"):
            if not model.has_tensor(name):
                raise InputError(
                    f"{model.path} has no {name}",
                    why=f"layer {layer} has no experts, or each in a tensor of its own (an old file)",
                    fix="convert the model again with a recent llama.cpp",
                )
        self._n = model.shape(first)[0]

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> list[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | list[Expert]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n))]
        if not -self._n <= index < self._n:
            raise IndexError(index)
        part = {
            f"{matrix}{ending}": self._part(f"ffn_{matrix}_exps.{kind}", index % self._n)
            for matrix in ("gate_up", "gate", "up", "down")
            for ending, kind in (("", "weight"), ("_bias", "bias"), ("_scale", "scale"))
        }
        for matrix in ("gate_up", "gate", "up", "down"):
            weight, scale = part[matrix], part[f"{matrix}_scale"]
            if weight is not None and scale is not None:
                part[matrix] = weight * scale
        if self._fused:  # gate first, then up
            for ending in ("", "_bias"):
                both = part[f"gate_up{ending}"]
                if both is not None:
                    part[f"gate{ending}"], part[f"up{ending}"] = np.split(both, 2)
        up, down = part["up"], part["down"]
        assert up is not None
        assert down is not None  # looked for in __init__
        return Expert(up, down, part["gate"], part["up_bias"], part["gate_bias"], part["down_bias"])

    def _part(self, name: str, index: int) -> NDArray[np.float32] | None:
        full = self._block + name
        return self._model.tensor(full, index) if self._model.has_tensor(full) else None
