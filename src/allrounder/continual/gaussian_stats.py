"""Classes as Gaussians: the mean and covariance of each class's features, and samples of them in place of stored data.

    S_c = covariance of the features + ridge I = L_c L_c^T,      f = mu_c + L_c e,  e ~ N(0, I)

Use it to go on training a classifier on earlier classes without their examples (MOS, SLCA). A Gaussian of features is
not data, but it is not nothing either: with few examples a class, its mean says much about them.

The factor L_c is computed once, when the class is added, and stored instead of S_c; samples cost one product with it.
Storage: d^2 + d numbers a class (d = 768: 2.4 MB in float32), which soon outweighs everything else a learner keeps;
`diagonal` covariances keep 2 d, and lose the correlations of features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["GaussianStats"]


class GaussianStats:
    """Mean and covariance of classes.

    Args:
        ridge: added to the variances, > 0. With fewer examples than features S_c is singular without it. Paper of MOS:
            1e-4.
        diagonal: keep variances only.

    Attributes:
        means: class -> `(d,)`.
        factors: class -> L_c `(d, d)`, or standard deviations `(d,)`.

    >>> stats = GaussianStats()
    >>> stats.add(3, torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    >>> features, classes = stats.sample([3], 4, torch.Generator().manual_seed(0))
    >>> features.shape, classes.tolist(), stats.means[3].tolist()
    (torch.Size([4, 2]), [3, 3, 3, 3], [1.0, 0.0])
    """

    def __init__(self, *, ridge: float = 1e-4, diagonal: bool = False) -> None:
        if not 0 < ridge < float("inf"):
            raise InputError(f"ridge is added to variances, above 0, got {ridge:g}")
        self.ridge, self.diagonal = ridge, diagonal
        self.means: dict[int, Tensor] = {}
        self.factors: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, label: int, features: Tensor) -> None:
        """Describe a class; one that is known already is described anew.

        Args:
            label: number of the class.
            features: `(n, d)`, n >= 2. Sums are taken in float64, what is kept has the features' dtype and device.

        Raises:
            InputError: fewer than 2 examples, features that are not finite, of another size than before, or so large
                that the ridge is lost in rounding.
        """
        if features.ndim != 2 or len(features) < 2:
            raise InputError(
                f"the covariance of class {label} needs features (n, d) of at least 2 examples, got "
                f"{tuple(features.shape)}"
            )
        known = next(iter(self.means.values()), features[0])
        if known.shape != features.shape[1:]:
            raise InputError(f"class {label} has {features.shape[1]} features, the classes before it {len(known)}")
        if not features.isfinite().all():
            raise InputError(f"the features of class {label} are not all finite")
        wide = features.double()
        mean = wide.mean(0)
        if self.diagonal:
            factor = (wide.var(0) + self.ridge).sqrt()
        else:
            covariance = (wide - mean).T @ (wide - mean) / (len(wide) - 1)
            try:
                factor = torch.linalg.cholesky(covariance + self.ridge * torch.eye(len(mean)).to(covariance))
            except torch.linalg.LinAlgError as error:
                raise InputError(
                    f"the covariance of class {label} is singular to rounding: its variances go up to "
                    f"{covariance.diagonal().max().item():.1e}, next to which ridge={self.ridge:g} is lost; scale the "
                    "features down or enlarge ridge"
                ) from error
        self.means[label], self.factors[label] = mean.to(features), factor.to(features)

    def sample(self, classes: Sequence[int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` vectors of each of these classes, class after class.

        Args:
            generator: on the CPU.

        Returns:
            Features `(classes x count, d)` and their classes `(classes x count,)`.

        Raises:
            InputError: a class that was not added, a count below 1.
        """
        if missing := [label for label in classes if label not in self.means]:
            raise InputError(f"class {missing[0]} was not added; known are {sorted(self.means)}")
        if count < 1 or not classes:
            raise InputError(f"sample at least 1 vector of at least 1 class, got {count} of {len(classes)}")
        drawn = []
        for label in classes:
            mean, factor = self.means[label], self.factors[label]
            noise = torch.randn(count, len(mean), generator=generator, dtype=mean.dtype).to(mean)
            drawn.append(mean + (noise * factor if self.diagonal else noise @ factor.T))
        features = torch.cat(drawn)
        return features, torch.tensor(list(classes), device=features.device).repeat_interleave(count)

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        stored = [*self.means.values(), *self.factors.values()]
        return sum(value.numel() * value.element_size() for value in stored)

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self.means), "factors": dict(self.factors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            InputError: variances where this keeps covariances, or the other way round.
        """
        if any((factor.ndim == 1) != self.diagonal for factor in state["factors"].values()):
            raise InputError(f"the saved classes were described with diagonal={not self.diagonal}; make this one alike")
        self.means, self.factors = dict(state["means"]), dict(state["factors"])
