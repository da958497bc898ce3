"""One cluster over the global batch, the whole queue on every rank."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor
from torch.futures import Future

from gq_triton.dist.routes.base import Context, Route
from gq_triton.options import LawOptions
from gq_triton.queues import Queues

__all__ = ["Whole"]


class Whole(Route):
    """The route of a bucket that is averaged, then weighted and queued on every rank alike.

    Args:
        context: what the route knows of the state.
        params: the model's parameters by name.
        law: how gradients are queued and weighted.
    """

    def __init__(self, context: Context, params: Mapping[str, Tensor], law: LawOptions) -> None:
        super().__init__(context, Queues(params, law))

    def start(self, names: tuple[str, ...], buffer: Tensor) -> Future:
        """Start to weight a bucket; see ``Route.start``."""
        self.even_(buffer)
        reduced = self.add_up(names, buffer, self.all_reduce)
        return reduced.then(partial(self.weigh, names, buffer))
