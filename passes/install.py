"""Use the pass under plain Inductor, or beside a user's own joint-graph pass.

from comet_compile import passes
torch._inductor.config.joint_custom_post_pass = passes.MoePass()
model = torch.compile(model)                      # backend="inductor"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from comet_compile.config import CometConfig
from comet_compile.passes.moe_pass import MoePass, Sink

GraphPass = CustomGraphPass | Callable[[fx.Graph], None]


class PassSequence(CustomGraphPass):
    """Several joint-graph passes as one: torch 2.11 takes a single pass where 2.13 takes a list."""

    def __init__(self, passes: Sequence[GraphPass]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """None (no caching) as soon as one pass has no identity, as for that pass alone."""
        identities = []
        for graph_pass in self.passes:
            identity = graph_pass.uuid() if isinstance(graph_pass, CustomGraphPass) else None
            if identity is None:
                return None
            identities.append(identity)
        return tuple(identities)


def with_user_pass(user: Any, config: CometConfig, sink: Sink | None = None) -> CustomGraphPass:
    """The user's passes (one, several or None) followed by the MoE pass."""
    own = list(user) if isinstance(user, (list, tuple)) else [user] if user is not None else []
    moe_pass = MoePass(config, sink)
    return PassSequence([*own, moe_pass]) if own else moe_pass
