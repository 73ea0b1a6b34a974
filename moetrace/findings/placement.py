"""Which experts to keep on the GPU, and what to type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from moetrace.analysis.placement.layers import compare_placements, layer_traffic
from moetrace.analysis.placement.run_cache import hot_experts
from moetrace.errors import UsageError
from moetrace.findings.expert_cache import left_out
from moetrace.findings.finding import Figure, Finding, Question, parameter
from moetrace.findings.subject import Subject
from moetrace.findings.wording import layer_list
from moetrace.host.memory import MemoryUse, memory_use
from moetrace.host.options import human_size, parse_size
from moetrace.model.file import ModelFile
from moetrace.numbers import number

_WORTH = 0.05  # share of what stays with the CPU from which on naming layers is worth a longer line


@dataclass(frozen=True)
class Placement(Question):
    """Which layers' experts fit on the GPU, which should be there, and what is typed for it?

    llama.cpp places the experts of whole layers. What a layer's experts are read for follows from the recorded run: the
    distinct experts of every ubatch, times their bytes. Those read most for their size are kept, as far as the memory
    goes beside everything else: weights that are no experts; the KV cache for --ctx-size positions and compute buffers
    for --ubatch-size tokens, by llama.cpp's own account where its llama-fit-params is found; and --reserve. Beside
    them the last layers (-ncmoe), the first, and none. Intervals over prompts. Ask about all phases (--phase all) if
    prompts are long.
    """

    name: ClassVar[str] = "placement"
    title: ClassVar[str] = "Experts on the GPU"
    place: ClassVar[int] = 210
    needs_model: ClassVar[bool] = True

    vram: str = parameter("", "memory of the GPU, as 12GiB; default: as much as holds half of the experts")
    ctx_size: int = parameter(8192, "positions of the KV cache, over all slots")
    ubatch_size: int = parameter(512, "tokens computed at once, for the size of compute buffers")
    reserve: str = parameter("1GiB", "left for whatever else is on the GPU")

    def answer(self, subject: Subject) -> Finding:
        """Answer it."""
        path = subject.need_model("placement")
        chosen = subject.routing.chosen
        if len(chosen) > 1:
            raise UsageError("several recordings, or contexts, are several runs", fix="ask about one of them")
        text = subject.routing.text
        if len(text) < len(subject.routing.texts):
            raise UsageError(
                "the recording is too long: of it only some texts are looked at, and not what was computed with them",
                fix="ask about a shorter recording",
            )
        layers = text.layers.tolist()
        with ModelFile(path) as model:
            each = [model.expert_bytes(layer) for layer in layers]
            sizes = [model.layer_expert_bytes(layer) for layer in layers]
            others = model.gpu_bytes_beside_experts
            kv = model.kv_bytes(self.ctx_size)
            unseen = sorted(set(model.moe_layers) - set(layers))
        if unseen:
            raise UsageError(
                f"nothing is known of layers {layer_list(unseen)}, whose experts need room as well",
                fix="record all layers, and leave out --layers",
            )
        step = np.asarray(chosen[0].trace.step[text.rows], dtype=np.int64)
        traffic = layer_traffic(text, step, each)
        account = memory_use(path, n_ctx=self.ctx_size, n_ubatch=self.ubatch_size)
        if account is not None:
            kv = max(account.kv, kv or 0)  # the account is rounded down
        cache = "unknown size, which is not counted" if kv is None else human_size(kv)
        compute = None if account is None else account.compute
        beside = parse_size(self.reserve) + others + (kv or 0) + (compute or 0)
        vram = parse_size(self.vram) if self.vram else beside + sum(sizes) // 2
        room = vram - beside
        memory = pd.DataFrame(
            {
                "what": [
                    "weights beside experts", "KV cache", "compute buffers", "reserve", "room for experts",
                    "all experts",
                ],
                "bytes": [
                    others,
                    np.nan if kv is None else kv,
                    np.nan if compute is None else compute,
                    parse_size(self.reserve),
                    max(room, 0),
                    sum(sizes),
                ],
            }
        )  # fmt: skip
        if room < 0:
            raise UsageError(
                f"{human_size(vram)} do not hold the model without any expert",
                why=f"its other weights take {human_size(others)}, the KV cache {cache},"
                + ("" if compute is None else f" compute buffers {human_size(compute)},")
                + f" and {self.reserve} are reserved",
                fix="give a smaller --ctx-size or --reserve; or leave layers on the CPU (-ngl)",
            )
        table, kept = compare_placements(traffic, sizes, room)
        rows: dict[str, dict[Any, Any]] = {str(r["placement"]): r for r in table.to_dict("records")}
        last, first, none = rows["last"], rows["first"], rows["no layer"]
        # naming layers is worth it where -ncmoe leaves clearly more
        use = "traffic" if last["more_low"] > _WORTH * last["left"] else "last"
        mine = rows[use]
        n = int(mine["kept"])
        some = 0 < n < len(layers)
        line = server_line(kept[use].tolist(), layers, named=use == "traffic")
        said = [
            f"Type: llama-server -m {path.name} -c {self.ctx_size}"
            + ("" if self.ubatch_size == 512 else f" -ub {self.ubatch_size}")
            + f" {line}",
            f"Beside {human_size(others)} of other weights"
            + ("" if compute is None else f", compute buffers of {human_size(compute)}")
            + f" and a KV cache of {cache},"
            f" {human_size(vram)} hold the experts of {number(n, 'layer')} of {len(layers)}"
            + (f" (here: {layer_list(mine['layers'].split())})" if some else "")
            + ".",
            f"Then {human_size(mine['left'])} ({_size_span(mine)}) of experts per token stay with the CPU, of"
            f" {human_size(none['left'])} if it had them all.",
        ]
        if some:
            best = rows["traffic"]
            said.append(
                f"Which layers they are: the last ones, as -ncmoe keeps, leave {human_size(last['left'])} per token,"
                f" the first {human_size(first['left'])}, those that are read most {human_size(best['left'])}"
                + (": naming them pays." if use == "traffic" else ": naming them is not worth it.")
            )
        hot = hot_experts(text, n=min(text.n_expert, int(text.n_expert * room / sum(sizes))))
        share = float((hot["served"] * hot["activations"]).sum() / hot["activations"].sum())
        if some:
            said.append(
                f"An engine that keeps single experts would serve {share:.0%} of activations from the same memory with"
                f" the hottest of each layer; whole layers serve {n / len(layers):.0%}. (moetrace export --format"
                " ktransformers, exllamav3, colibri or moe-trace gives it their counts.)"
            )
        caveats = [
            _accounted(account),
            "The hottest experts are those of these same texts; other texts may need others (expert-cache holds prompts"
            " out).",
        ]
        if kv is None:
            caveats.append(
                "How large the KV cache of this architecture is cannot be said: it is not counted."
            )
        by_layer = pd.DataFrame(
            {
                "layer": layers,
                "expert_bytes": each,
                "layer_bytes": sizes,
                "read_per_token": traffic.read.sum(axis=0) / traffic.tokens.sum(),
                "kept": np.isin(np.arange(len(layers)), kept[use]),
                "hottest": hot["hottest"],
            }
        )
        caveats += left_out(chosen[0], len(text))
        return self.finding(
            subject, said, {"placements": table, "by_layer": by_layer, "memory": memory}, caveats
        )

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """Bytes read per token by layer, and which are kept."""
        from moetrace import plot

        table = finding.tables["by_layer"]
        return {
            "by_layer": Figure(
                lambda ax: plot.traffic(table, ax=ax),
                "Bytes of experts read per token, by layer, and which layers' experts are kept on the GPU.",
            )
        }


def _accounted(account: MemoryUse | None) -> str:
    """Where the sizes of KV cache and compute buffers are from."""
    more = "if llama.cpp runs out of memory, raise --reserve."
    if account is None:
        return (
            "The KV cache is an estimate, and compute buffers are not counted but in --reserve: no llama-fit-params"
            f" was found that says them (moetrace setup builds it); {more}"
        )
    if not account.devices:
        return (
            "KV cache and compute buffers are what llama.cpp says of this machine, where it sees no GPU: compute"
            f" buffers of a GPU differ; {more}"
        )
    return (
        f"KV cache and compute buffers are what llama.cpp says of {', '.join(account.devices)}, with the experts with"
        f" the CPU; {more}"
    )


def _size_span(row: dict[Any, Any]) -> str:
    if np.isnan(row["low"]):
        return "no interval"
    return f"{human_size(max(row['low'], 0))} to {human_size(row['high'])}"


def server_line(kept: Sequence[int], layers: Sequence[int], *, named: bool) -> str:
    """llama-server's options that keep these layers' experts (indices) on the GPU, and the others' with the CPU.

    ``named`` by -ot; else by -ncmoe, which keeps the last layers.
    """
    left = [layer for i, layer in enumerate(layers) if i not in set(kept)]
    if not left:
        return "-ngl 99"
    if not len(kept):
        return "-ngl 99 -cmoe"
    if not named:
        return f"-ngl 99 -ncmoe {max(left) + 1}"  # it counts all layers from 0, dense ones too
    return f'-ngl 99 -ot "blk\\.({"|".join(map(str, left))})\\.ffn_(gate|up|down|gate_up)_exps=CPU"'
