"""The coverage: which parameters' gradients are known by cluster, and what is said of the others.

A parameter that was used past its layers, or where the samples cannot be told apart, has its whole
gradient weighted as that of one cluster. The coverage keeps the reasons, and warns once for each
parameter or, with ``strict=True``, raises.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from gq_triton.ring import capturing

__all__ = ["Coverage"]


class Coverage:
    """The parameters of a model whose gradients are known by cluster, and why others are not.

    Args:
        params: the model's parameters by name.
        covered: names of the parameters that belong to layers which sum by cluster.

    Attributes:
        known: by parameter name, whether the whole of its last gradient came from layers that sum
            by cluster.
        reasons: by parameter name, why its gradient is not known, where a layer has said so.
        kinds: by parameter name, the class of the layer that sums its gradients.
        told: names of the parameters that the user was warned of.
        strict: whether a gradient that is not known is an error.
        mend: called with the names of parameters that were taken as one cluster's; finds a way to
            know some of them by cluster from now on, and returns the others. None finds none.
    """

    def __init__(self, params: Mapping[str, Tensor], covered: Iterable[str]) -> None:
        self._params, self._covered = params, set(covered)
        self.known: dict[str, bool] = {}
        self.reasons: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.told: set[str] = set()
        self.strict = False
        self.mend: Callable[[list[str]], list[str]] | None = None

    def why_whole(self, name: str) -> str:
        """Return why a parameter's last gradient was taken as one cluster's."""
        kind = self.kinds.get(name)
        return self.reasons.get(
            name, f"used past {kind}" if kind else "used where the samples cannot be told apart"
        )

    def note_later(self, grads: Mapping[str, Tensor]) -> None:
        """Note that gradients are weighted as one cluster though no forward pass was seen.

        Args:
            grads: gradients by parameter name. Those of parameters that clusters do not cover do
                not count, nor do zeros: ``zero_grad(set_to_none=False)`` leaves them to a layer
                that the step did not use.

        Raises:
            RuntimeError: with ``strict=True``.
        """
        covered = {name: grad for name, grad in grads.items() if name in self._covered}
        if any(capturing(grad.device) for grad in covered.values()):
            return  # the host cannot read them, and the steps before were told
        whole = [name for name, grad in covered.items() if bool(grad.any())]
        self.known.update(dict.fromkeys(whole, False))
        self.tell([name for name in whole if name not in self.told])

    def tell(self, whole: list[str]) -> None:
        """Warn, or with ``strict=True`` raise, that parameters are taken as one cluster's."""
        if whole and self.strict:
            raise RuntimeError(
                f"strict=True, and these parameters are not known by cluster: {self.listed(whole)}"
            )
        if whole:
            self.told.update(whole)
            self.warn(whole)

    def warn(self, names: list[str]) -> None:
        """Warn that parameters are weighted as one cluster, with their share of the model."""
        trainable = sum(param.numel() for param in self._params.values() if param.requires_grad)
        share = sum(self._params[name].numel() for name in names) / max(trainable, 1)
        warnings.warn(
            f"weighted without clusters, as one batch: {self.listed(names)}; {share:.0%} of the "
            "trainable elements",
            stacklevel=4,
        )

    def listed(self, names: list[str]) -> str:
        """Return parameters with the reasons why they are taken as one cluster's."""
        by_reason: dict[str, list[str]] = {}
        for name in names:
            by_reason.setdefault(self.why_whole(name), []).append(name)
        return "; ".join(f"{', '.join(named)} ({why})" for why, named in by_reason.items())
