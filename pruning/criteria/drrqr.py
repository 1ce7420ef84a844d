"""The method of arXiv 2602.04852: strong rank-revealing QR of the rows [q; k].

q and k are taken after convolution and SiLU and before L2 normalisation, so the Gram is Gq + Gk of the raw rows.
"""

import math

from pruning.criteria.base import Choice, Criterion, Head
from pruning.linalg import strong_rrqr


class DRRQR(Criterion):
    name = "drrqr"
    summary = "strong rank-revealing QR of the stacked queries and keys (the paper's method)"
    statistics = ("q", "k")

    def select(self, head: Head, n: int) -> Choice:
        result = strong_rrqr(head.statistics["q"] + head.statistics["k"], n)
        return Choice(
            result.keep,
            {
                "rank": result.rank,
                "swaps": result.swaps,
                "condition": result.condition if math.isfinite(result.condition) else None,
                "retained_energy": result.energy,
            },
        )
