"""K-means on the features of one batch, whose labels are Grad Queue's clusters.

It is made for training loops: the host never waits for the device, centres start where those of the
last step ended, and results are the same bit for bit every time. They are those of
``sklearn.cluster.KMeans(algorithm="lloyd", n_init=1)`` from the same start.

Ties are broken by the lowest index. A sample equally near to several centres gets the lowest label.
Of centres that coincide (to rounding) the lowest gets all samples. Of samples equally far from
their centres the lowest is relocated first.

Shapes: B samples, F features, K clusters, T candidates per k-means++ draw, M = min(B, K), any N.
"""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from gq_triton.engines import engine
from gq_triton.engines.eager.distances import cost, row_norms
from gq_triton.engines.eager.lloyd import NOT_FINITE, assign, standardise
from gq_triton.options import check_backend
from gq_triton.saved.rules import Maybe, Record, check
from gq_triton.saved.tensors import GeneratorState, TensorLike

__all__ = ["NOT_FINITE", "KMeans"]

_CENTERS = "cluster_centers"
_GENERATOR = "generator"
# Most clusters that the kernel takes.
_MOST_CLUSTERS = 128


def _check_features(features: Tensor, centers: Tensor | None) -> None:
    """Raise an error for features of a wrong type or shape."""
    if not features.dtype.is_floating_point:
        raise TypeError(f"features must be floating point, got {features.dtype}; call .float()")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"features must have shape (B >= 1, F >= 1), got {tuple(features.shape)}; "
            "average or flatten positions first"
        )
    if centers is not None and centers.shape[1] != features.shape[1]:
        raise ValueError(
            f"features have {features.shape[1]} columns but the centres of this KMeans have "
            f"{centers.shape[1]}; build a new KMeans for other features"
        )


def _plus_plus(x: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Return K of the samples (B, F), indices, by greedy k-means++ (Arthur and Vassilvitskii 2007).

    Each seed is the best of T candidates, which are drawn in proportion to the squared distances to
    the seeds so far. The distances are cumulated as integers, which are exact in any order of
    summation, so the seeds are reproducible on a GPU.
    """
    shape = n_clusters, 2 + int(math.log(n_clusters))
    draws = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    draws = draws.to(x.device, non_blocking=True)  # the host does not wait
    norms = row_norms(x)[:, None]
    chosen = [(draws[0, :1] * len(x)).long()]
    closest = (cost(x, x[chosen[0]]) + norms).clamp_(min=0)  # (B, 1)
    for draw in draws[1:]:
        peak = closest.max()
        share = closest[:, 0] / torch.where(peak > 0, peak, 1.0)
        cumulated = (share.double() * 2**32).long().cumsum(0)
        hits = torch.searchsorted(cumulated, (draw * cumulated[-1]).long(), right=True)
        hits = hits.clamp_(max=len(x) - 1)  # (T,)
        trial = (cost(x, x[hits]) + norms).clamp_(min=0).minimum(closest)  # (B, T)
        best = trial.sum(0).argmin().view(1)
        closest = trial.index_select(1, best)
        chosen.append(hits[best])
    return torch.cat(chosen)


def _writable(tensor: Tensor) -> bool:
    """Return whether a tensor may be written in place: none of inference mode may outside of it."""
    return tensor.is_inference() <= torch.is_inference_mode_enabled()


class KMeans:
    """K-means with scikit-learn's names; ``kmeans(features)`` returns labels.

    On a GPU nothing in ``fit`` waits for the device. A small batch takes one launch, which ends at
    convergence. A large one takes a launch per iteration, and those after convergence return at
    once. Autocast has no effect here. TF32 has, where it is switched on for float32 products, on
    k-means++ and on what runs in plain torch.

    k-means++ draws from this object's own generator, which is on the CPU for every device and is
    not reset: a second start differs from the first. Global generators are left alone.

    Args:
        n_clusters: K >= 1. If K exceeds the number of distinct samples, the surplus clusters are
            empty: their size is 0, and their centres repeat another one.
        init: "k-means++", or the centres (K, F) to start from.
        max_iter: Lloyd iterations, >= 1; few are enough with a warm start.
        tol: converged once the squared shift of all centres is at most tol times the mean variance
            of a feature (scikit-learn's definition), or no label changes.
        random_state: seed of the generator.
        warm_start: start from the centres of the last fit, or the loaded ones, if there are any.
            Features drift slowly, so this saves most iterations, and the K - 1 sequential draws of
            k-means++. False starts from ``init`` every time.
        nonfinite: "raise" an error for NaN or infinite features, or replace such values by "zero",
            for features that overflow now and then under a loss scaler.
        backend: the engine, as for ``GradQueue``. Float64 and more than 128 clusters run in plain
            torch.

    Attributes:
        labels_: (B,) int64, the label of each sample's nearest centre.
        cluster_centers_: (K, F) float32, float64 for float64 features. The next ``fit`` writes to
            the same memory.
        cluster_sizes_: (K,) int64, sums to B.
        inertia_: (), the sum of squared distances to the nearest centres, in the centres' dtype.
        n_iter_: () int64, iterations until convergence.
        nonfinite_: () bool, whether features on a GPU were NaN or infinite in a batch so far, where
            that is an error. Such a batch has label 0 throughout and leaves the centres alone.
            ``fit`` sets all these attributes, on the device of the features.

    Raises:
        TypeError: ``n_clusters``, ``max_iter`` or ``random_state`` is no integer.
        ValueError: an argument out of its range, or ``init`` not finite and (K, F).

    Examples:
        >>> import torch
        >>> kmeans = KMeans(2)
        >>> labels = kmeans(torch.tensor([[0.0, 1.0], [8.0, 8.0], [0.0, 2.0]]))
        >>> bool(labels[0] == labels[2]), bool(labels[0] == labels[1])
        (True, False)
        >>> sorted(kmeans.cluster_centers_.tolist())
        [[0.0, 1.5], [8.0, 8.0]]
    """

    labels_: Tensor
    cluster_centers_: Tensor
    cluster_sizes_: Tensor
    inertia_: Tensor
    n_iter_: Tensor

    def __init__(
        self,
        n_clusters: SupportsIndex,
        *,
        init: Literal["k-means++"] | Tensor | Sequence[Sequence[float]] = "k-means++",
        max_iter: SupportsIndex = 10,
        tol: float = 1e-4,
        random_state: SupportsIndex = 0,
        warm_start: bool = True,
        nonfinite: Literal["raise", "zero"] = "raise",
        backend: str = "auto",
    ) -> None:
        self.n_clusters = operator.index(n_clusters)
        self.max_iter = operator.index(max_iter)
        self.tol = float(tol)
        self.random_state = operator.index(random_state)
        self.warm_start = bool(warm_start)
        self.nonfinite = nonfinite
        for name, value in (("n_clusters", self.n_clusters), ("max_iter", self.max_iter)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol must be finite and >= 0, got {tol}")
        if nonfinite not in ("raise", "zero"):
            raise ValueError(f"nonfinite must be 'raise' or 'zero', got {nonfinite!r}")
        if isinstance(init, str) and init != "k-means++":
            raise ValueError(f"init must be 'k-means++' or an array of centres, got {init!r}")
        check_backend(backend)
        self.backend = backend
        self.init = init if isinstance(init, str) else self._checked_centers(init, "init")
        self._generator = torch.Generator().manual_seed(self.random_state)

    def fit_predict(self, features: Tensor) -> Tensor:
        """Call ``fit``; return ``labels_``, (B,) int64 on the features' device."""
        return self.fit(features).labels_

    __call__ = fit_predict

    @torch.no_grad()
    def fit(self, features: Tensor) -> "KMeans":
        """Cluster one batch.

        Args:
            features: (B, F), a row per sample, of any floating dtype and device; detached here.
                float16 and bfloat16 are computed in float32.

        Returns:
            This object, with its attributes set.

        Raises:
            TypeError: features are not floating point.
            ValueError: features are not (B, F) with B, F >= 1, have another F than the centres to
                start from, or hold a NaN or an infinity and are on the CPU. On a GPU
                ``nonfinite_`` says that they do.
        """
        start = None if isinstance(self.init, str) else self.init
        if self.warm_start:
            start = getattr(self, "cluster_centers_", start)
        _check_features(features, start)
        zero, wide = self.nonfinite == "zero", features.dtype == torch.float64
        with torch.autocast(device_type=features.device.type, enabled=False):
            if start is None:
                x = standardise(features, zero)[0]
                start = features.index_select(0, _plus_plus(x, self.n_clusters, self._generator))
                start = torch.nan_to_num(start, nan=0.0, posinf=0.0, neginf=0.0)
            centers = self._buffer(start, features.device, torch.float64 if wide else torch.float32)
            flag = getattr(self, "nonfinite_", None)
            if flag is None or flag.device != centers.device or not _writable(flag):
                flag = torch.zeros((), dtype=torch.bool, device=centers.device)
            # What the kernel does not take is done in plain torch.
            plain = wide or self.n_clusters > _MOST_CLUSTERS
            ops = engine(features.device, "torch" if plain else self.backend)
            results = ops.lloyd_(
                features, centers, flag, max_iter=self.max_iter, tol=self.tol, zero=zero
            )
            self.cluster_centers_, self.nonfinite_ = centers, flag
            self.labels_, self.cluster_sizes_, self.inertia_, self.n_iter_ = results
        return self

    def _buffer(self, start: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the memory of the centres, which hold the start."""
        own = start is getattr(self, "cluster_centers_", None) and _writable(start)
        if own and start.device == device and start.dtype == dtype:
            return start
        return start.detach().to(device, dtype, copy=True).contiguous()

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return the labels (B,) int64 of features (B, F) by the present centres.

        Raises:
            TypeError: as ``fit``.
            ValueError: as ``fit``.
            RuntimeError: there are no centres yet; or as ``fit``.
        """
        centers: Tensor | None = getattr(self, "cluster_centers_", None)
        if centers is None:
            raise RuntimeError("KMeans has no centres yet; call fit or load_state_dict first")
        _check_features(features, centers)
        with torch.autocast(device_type=features.device.type, enabled=False):
            x, frame, finite = standardise(features, self.nonfinite == "zero")
            labels = assign(x, frame.enter(centers))[0]
            return labels if finite is None else torch.where(finite, labels, 0)

    def kept(self) -> Iterator[Tensor]:
        """Yield the tensors that go on from fit to fit; after a load they are others."""
        for name in ("cluster_centers_", "nonfinite_"):
            if hasattr(self, name):
                yield getattr(self, name)

    def state_dict(self) -> dict[str, Any]:
        """Return the centres (None before a fit) and the generator's state, for a resumed run."""
        centers = getattr(self, "cluster_centers_", None)
        centers = None if centers is None else centers.clone()
        return {_CENTERS: centers, _GENERATOR: self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, with tensors on any device.

        Raises:
            ValueError: the state is not one of a KMeans with this K. Nothing is changed.
        """
        self.check_saved(state)
        centers = state[_CENTERS]
        self._generator.set_state(state[_GENERATOR].cpu().contiguous())
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)  # what an earlier fit left
        if centers is not None:
            self.cluster_centers_ = centers.detach().clone()

    def check_saved(self, state: Any) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded."""
        centers = TensorLike((self.n_clusters, None), (torch.float32, torch.float64), finite=True)
        rules = {_CENTERS: Maybe(centers), _GENERATOR: GeneratorState()}
        check(state, Record(rules), "the saved KMeans")

    def _checked_centers(self, array: Tensor | Sequence[Sequence[float]], name: str) -> Tensor:
        """Return a private copy of centres (K, F) that the user gave."""
        centers = torch.as_tensor(array).detach().clone()
        if not centers.dtype.is_floating_point:
            centers = centers.double()
        if centers.ndim != 2 or len(centers) != self.n_clusters or not centers.numel():
            raise ValueError(
                f"{name} must have shape ({self.n_clusters}, features), got {tuple(centers.shape)}"
            )
        if not bool(centers.isfinite().all()):
            raise ValueError(f"{name} must be finite, got a NaN or an infinity")
        return centers
