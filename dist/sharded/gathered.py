"""Clusters of a model that ``fully_shard`` has divided meet its parameters when they are whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from gq_triton.cluster_grad import Clusters
from gq_triton.dist.sharded.layout import Layout

__all__ = ["GatheredClusters"]


class GatheredClusters(Clusters):
    """``Clusters`` of a divided model, whose parameters are whole only while a pass uses them.

    Attributes:
        _layout: the layout of the model, set before ``install``.
    """

    _layout: Layout

    def install(self) -> Callable[[], None]:
        """Make the model's backward passes use the sink's gradients; return what undoes it."""
        undo, handles = super().install(), self._hooks()

        def undo_all() -> None:
            for handle in handles:
                handle.remove()
            handles.clear()
            undo()

        self.uninstall = undo_all
        return undo_all

    def _hooks(self) -> list[Any]:
        """Hook all that has to be seen of the divided modules; return the hooks' handles."""
        handles: list[Any] = []
        for owner, members in self._layout.members.items():
            see: Any = torch.compiler.disable(partial(self._meet, members))
            handles.append(owner.register_forward_pre_hook(see))
        return handles

    def _meet(self, members: list[tuple[nn.Module, str, str]], module: nn.Module, _: Any) -> None:
        """Note the gathered parameters, to which autograd gives the gradients."""
        accumulator = self.accumulator
        if torch.is_grad_enabled() and not accumulator.asleep:
            for holder, attribute, name in members:
                leaf = holder._parameters[attribute]
                if leaf is not None and leaf is not accumulator.params[name]:
                    accumulator.meet(name, leaf)
