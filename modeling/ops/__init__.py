"""The gated delta rule behind one small interface.

Every form of it computes, per value head and token, in float32 or wider (arXiv 2412.06464, eq. 10):

    S = exp(g) * S;  u = beta * (v - S^T k);  S = S + k u^T;  o = S^T (q * scale)

over packed sequences: sequence i owns tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`. The state S is K-first,
`[num_v_heads, d_k, d_v]`.
"""

from modeling.ops.chunked import chunked_gated_delta_rule
from modeling.ops.reference import reference_gated_delta_rule, reference_step, wide
from modeling.ops.rule import GatedDeltaRule, RuleInputs

__all__ = [
    "GatedDeltaRule",
    "RuleInputs",
    "chunked_gated_delta_rule",
    "reference_gated_delta_rule",
    "reference_step",
    "wide",
]
