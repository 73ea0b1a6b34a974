"""Which experts of a layer become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Grouping:
    """Which experts of a layer become one.

    Attributes
    ----------
    group
        (E,) the new number of each expert; −1: it is left out.
    use
        (E,) how often each is used: the weights of the average.
    """

    group: npt.NDArray[np.int64]
    use: npt.NDArray[np.float64]

    @property
    def n_expert(self) -> int:
        """Experts that are left."""
        return int(self.group.max()) + 1

    def members(self, new: int) -> npt.NDArray[np.int64]:
        """The experts that become expert ``new``; the most used one first, to which the others are matched."""
        mine = np.flatnonzero(self.group == new)
        return np.asarray(mine[np.argsort(-self.use[mine], kind="stable")], np.int64)

    def shares(self, new: int) -> npt.NDArray[np.float64]:
        """Weights of :meth:`members` in the average: by use, or alike where none of them is used."""
        use = self.use[self.members(new)]
        return np.asarray(use / use.sum() if use.sum() > 0 else np.full(len(use), 1 / len(use)))
