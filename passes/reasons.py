"""Why a candidate region was left alone: a closed, countable list.

Every candidate ends rewritten or with exactly one :class:`Rejection`. The value of a reason is
its name in counters and reports; its advice says, to the person whose model it is, what to change.
"""

from __future__ import annotations

import dataclasses
import enum


class RejectReason(enum.Enum):
    """The closed list of refusals."""

    advice: str

    def __new__(cls, value: str, advice: str) -> RejectReason:
        member = object.__new__(cls)
        member._value_ = value
        member.advice = advice
        return member

    UNPAIRED_GEMM = (
        "unpaired_gemm",
        "An expert GEMM has no partner: the graph holds the first or the second projection of "
        "the experts but not both. A graph break inside the layer does this; run with "
        "TORCH_LOGS=graph_breaks, or compile with fullgraph=True to see where.",
    )
    NO_TOKENS = (
        "no_tokens",
        "The rows that enter the experts could not be followed back to the layer's tokens "
        "[T, H]. Usually the gather or dispatch ran in another graph (a graph break), or uses an "
        "operation that comet does not follow. Under expert parallelism, transformers' "
        'ep_implementation "all_to_all" breaks the graph there: import comet_compile.huggingface '
        'and choose "comet".',
    )
    NO_EXPERT_IDS = (
        "no_expert_ids",
        "No single integer tensor [T, top_k] determines which expert each row goes to. Usually "
        "the routing indices were computed in another graph (a graph break): keep the router, "
        "the dispatch and the experts in one graph.",
    )
    RUNTIME_NUMBER = (
        "runtime_number",
        "A number of the layer (for example the slope of its activation) is an input of the "
        "graph: under dynamic=True Dynamo treats Python floats so. Set "
        "torch._dynamo.config.specialize_float = True, or leave dynamic at its default.",
    )
    NO_OUTPUT = (
        "no_output",
        "The experts' rows could not be followed to one output of the tokens' shape [T, H]. "
        "Usually the un-permutation or combine ran in another graph (a graph break).",
    )
    UNSUPPORTED_OP = (
        "unsupported_op",
        "The region contains an operation whose meaning comet cannot follow. If it is a custom "
        "op, write it in PyTorch operations while compiling.",
    )
    SEPARATE_EXPERTS = (
        "separate_experts",
        "Each expert's matrices are parameters of their own, and to copy them into one stack in "
        "every call would cost more than it brings. Keep one parameter [experts, in, out] for each "
        "projection of all experts.",
    )
    UNSUPPORTED_DTYPE = (
        "unsupported_dtype",
        "Experts must compute in bfloat16, float16, float32 or float64.",
    )
    UNSUPPORTED_LAYOUT = (
        "unsupported_layout",
        "Expert weights must be [experts, in, out] stacks (or permuted views of them) whose "
        "second projection takes as many columns as the first makes (or half, when gated).",
    )
    UNKNOWN_ACTIVATION = (
        "unknown_activation",
        "Routing is understood but the function between the two projections is none of the "
        "known activations (SwiGLU, clamped GLU, GELU-GLU, ReLU-GLU, SiLU, GELU, ReLU, ReLU^2).",
    )
    NOT_EQUIVALENT = (
        "not_equivalent",
        "Interpreted on chosen routings, the region does not compute "
        "sum_j w[t, j] * FFN_ids[t, j](x[t]). If the layer is meant to, this points at a bug in "
        "its permutation, its inverse or its weighting.",
    )
    OUT_OF_RANGE_IDS = (
        "out_of_range_ids",
        "Expert ids outside [0, E) would be treated differently from the original code, and the "
        "graph does not show that they cannot occur. Take ids from topk over E logits, or mask "
        "such rows to zero.",
    )
    REPEATED_IDS = (
        "repeated_ids",
        "The region is only right if the expert ids of one token differ, and the graph does not "
        "show that they do. Take the ids from topk, or count rows by id (one count per slot).",
    )
    VALUE_USED_ELSEWHERE = (
        "value_used_elsewhere",
        "A value inside the region (for example the experts' raw output) is also used outside "
        "it, so the region cannot be replaced. Compute that use from the layer's input or output.",
    )
    MIXED_GROUPS = (
        "mixed_groups",
        "Dispatch and combine run on different process groups.",
    )
    UNKNOWN_GROUP = (
        "unknown_group",
        "The region names a process group that does not exist in this process.",
    )
    DYNAMIC_SPLITS = (
        "dynamic_splits",
        "The all-to-all's split sizes enter the graph as plain numbers: they were read on the "
        "host in another graph. Leave comet.capture_scalars on (the default), and remove "
        "branches on the number of rows.",
    )
    TOO_LARGE = (
        "too_large",
        "The region is larger than comet.max_proof_rows allows to interpret. Raise that option, "
        "or compile with dynamic=True so that a smaller size can be interpreted.",
    )
    BACKWARD_NOT_PROVEN = (
        "backward_not_proven",
        "The forward region is understood but its gradients were not all found, or one is not "
        "the derivative (for example scaled inside the region), so neither direction is replaced.",
    )
    INTERNAL_ERROR = (
        "internal_error",
        "comet itself failed while looking at this region; it is left as it was. Please report "
        "this with the log of TORCH_LOGS=+comet_compile.",
    )
    BACKWARD_DISABLED = (
        "backward_disabled",
        "comet.backward is off, and forward and backward are only replaced together.",
    )


@dataclasses.dataclass(frozen=True)
class Rejection:
    """One refusal: the reason and one line of detail with names."""

    reason: RejectReason
    detail: str


# reasons of wider or narrower cuts that failed say less than these
_TELLING = (
    RejectReason.VALUE_USED_ELSEWHERE,
    RejectReason.BACKWARD_NOT_PROVEN,
    RejectReason.OUT_OF_RANGE_IDS,
    RejectReason.UNKNOWN_ACTIVATION,
    RejectReason.UNKNOWN_GROUP,
    RejectReason.MIXED_GROUPS,
    RejectReason.UNSUPPORTED_DTYPE,
    RejectReason.UNSUPPORTED_LAYOUT,
    RejectReason.TOO_LARGE,
    RejectReason.DYNAMIC_SPLITS,
    RejectReason.UNSUPPORTED_OP,
)


def more_telling(first: Rejection | None, second: Rejection) -> Rejection:
    """Of two refusals of the same layer, the one that got further."""
    if first is None:
        return second

    def rank(rejection: Rejection) -> int:
        known = rejection.reason in _TELLING
        return _TELLING.index(rejection.reason) if known else len(_TELLING)

    return min(first, second, key=rank)
