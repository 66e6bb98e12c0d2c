"""comet_compile.passes: find MoE layers in a joint graph, prove them, replace them.

MoePass            the joint-graph pass; works under backend="inductor" too
with_user_pass     the same after a user's own passes
RejectReason       why a region is left alone
"""

if __name__ != "comet_compile.passes":
    raise ImportError(
        "this folder is installed as comet_compile.passes; a bare 'import passes' found it "
        "because the repository root is on sys.path"
    )

from comet_compile.passes.install import PassSequence, with_user_pass
from comet_compile.passes.moe_pass import MoePass, RegionRefused
from comet_compile.passes.reasons import Rejection, RejectReason

__all__ = [
    "MoePass",
    "PassSequence",
    "RegionRefused",
    "RejectReason",
    "Rejection",
    "with_user_pass",
]
