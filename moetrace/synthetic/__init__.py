"""Small Mixture-of-Experts models with random weights, in llama.cpp's own architectures.

>>> from moetrace.synthetic import write_model
>>> write_model("tiny.gguf", "qwen3moe", n_expert=32, n_expert_used=4)  # doctest: +SKIP
"""

from moetrace.synthetic.architectures import ARCHITECTURES, Architecture, Gating, Mixer
from moetrace.synthetic.planted import Planted, digit_tokens, distinct_tokens, write_planted
from moetrace.synthetic.writer import QUANTIZATIONS, write_model

__all__ = [
    "ARCHITECTURES",
    "QUANTIZATIONS",
    "Architecture",
    "Gating",
    "Mixer",
    "Planted",
    "digit_tokens",
    "distinct_tokens",
    "write_model",
    "write_planted",
]
