"""A question of one's own: its analysis, and its finding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from moetrace.errors import UsageError
from moetrace.findings import Figure, Finding, Method, Question, Subject, parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def share_of_busiest(counts: npt.ArrayLike, n: int) -> npt.NDArray[np.float64]:
    """Share of picks that the n busiest experts of each layer get: counts (P, L, E) -> (L,); NaN without picks."""
    total = np.sort(np.asarray(counts, dtype=np.float64).sum(axis=0), axis=1)[:, ::-1]
    with np.errstate(invalid="ignore"):
        return np.asarray(total[:, :n].sum(axis=1) / total.sum(axis=1))


@dataclass(frozen=True)
class ShareOfBusiest(Question):
    """What share of a layer's picks do its busiest experts get?

    Picks of all prompts together, experts in order of their picks; an even layer gives n/E. It is measured on the very
    tokens by which the busiest were chosen, so it is never below that.
    """

    name: ClassVar[str] = "share-of-busiest"
    title: ClassVar[str] = "Share of the busiest experts"
    place: ClassVar[int] = 95  # after load-balance
    methods: ClassVar[tuple[Method, ...]] = (
        Method(
            "busiest",
            "Busiest experts",
            "busiest",
            "Those that get most of a layer's picks in this recording.",
        ),
    )

    n: int = parameter(2, "how many of the busiest")

    def answer(self, subject: Subject) -> Finding:
        """Count."""
        counts = subject.counts
        if not 1 <= self.n <= counts.n_expert:
            raise UsageError(f"--n {self.n} cannot be", fix=f"give 1 to {counts.n_expert}")
        table = pd.DataFrame({"layer": counts.layers, "share": share_of_busiest(counts.included, self.n)})
        table["even"] = self.n / subject.n_expert
        known = table[table["share"].notna()]
        if known.empty:
            return self.finding(subject, ["There are no picks to share."], {"share": table}, concludes=False)
        top = known.loc[known["share"].idxmax()]
        said = (
            f"The {self.n} busiest experts get most in layer {top['layer']:.0f}: {top['share']:.0%} of the picks, where"
            f" an even layer would give them {top['even']:.0%}."
        )
        return self.finding(subject, [said], {"share": table}, ["Chosen because they are the busiest."])

    def figures(self, finding: Finding) -> dict[str, Figure]:
        """The share by layer."""
        table = finding.tables["share"]

        def draw(ax: Axes) -> Axes:
            ax.plot(table["layer"], table["share"], marker="o")
            ax.set(xlabel="layer", ylabel="share of picks", ylim=(0, 1))
            return ax

        return {"share": Figure(draw, "Share of picks of the busiest experts, by layer.")}
