"""Changes to a graph that can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from comet_compile.passes.emit import Emitter


class Edits:
    """Adds nodes and has others read them; `undo` leaves the graph as it was."""

    def __init__(self) -> None:
        self._added: list[fx.Node] = []
        self._redirected: list[tuple[fx.Node, fx.Node, fx.Node]] = []

    def __bool__(self) -> bool:
        return bool(self._redirected)

    def add(self, before: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Put a call in front of `before`; it takes after its first operand."""
        like = args[0][0] if isinstance(args[0], list) else args[0]
        node = Emitter(before.graph, before, like).call(target, *args)
        self._added.append(node)
        return node

    def redirect(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Have `user` read `new` where it reads `old`; not one that reads `new` already."""
        if new not in user.all_input_nodes:  # else the two could not be told apart again
            user.replace_input_with(old, new)
            self._redirected.append((user, old, new))

    def undo(self) -> None:
        """Take everything back, whatever others have changed in the same users since."""
        for user, old, new in reversed(self._redirected):
            user.replace_input_with(new, old)
        for node in reversed(self._added):
            node.graph.erase_node(node)
