"""Distances between sets of images, from their features."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_kernel

from sdcomp.evaluation.non_finite import require_finite


def kid_values(
    features: Tensor,
    reference: Tensor,
    groups: Sequence[Hashable] | None = None,
    reference_groups: Sequence[Hashable] | None = None,
) -> Tensor:
    """The contribution of each image to the Kernel Inception Distance, `(N,)`.

    Their mean is the KID without groups, and its jackknife estimate with them.

    KID is the unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et al.
    2018) between `features` `(N, d)` and `reference` `(M, d)`, here over all images instead of random
    subsets. The contributions are jackknife pseudo-values (Efron & Stein 1981) for a fixed reference, so
    that they have intervals and paired differences like any other score.

    `groups` and `reference_groups` name the scene of each image. Images of one scene are not independent, so
    pairs of them are left out of all three sums: a sum that kept them would be too large.

    Raises ValueError for fewer than three images or scenes, for features of different sizes and for another
    number of groups; NonFiniteError for features that are not finite.
    """
    n, m = len(features), len(reference)
    x_groups = range(n) if groups is None else groups
    y_groups = range(-m, 0) if reference_groups is None else reference_groups
    if (len(x_groups), len(y_groups)) != (n, m):
        raise ValueError(f"{len(x_groups)} and {len(y_groups)} groups do not fit {n} and {m} images")
    if len(set(x_groups)) < 3 or len(set(y_groups)) < 3:
        raise ValueError(f"KID needs at least 3 images of different scenes on each side, not {n} and {m}")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features {tuple(features.shape)} do not fit reference {tuple(reference.shape)}")
    require_finite("features of images", features, reference)
    x, y = features.double(), reference.double()
    within, pairs_within = _row_sums(x, x, x_groups, x_groups)
    between, pairs_between = _row_sums(x, y, x_groups, y_groups)
    fixed, pairs_fixed = (part.sum() for part in _row_sums(y, y, y_groups, y_groups))
    # Row i without the other rows: its pairs within the set stand in two rows.
    whole = within.sum() / pairs_within.sum() - 2 * between.sum() / pairs_between.sum()
    without = (within.sum() - 2 * within) / (pairs_within.sum() - 2 * pairs_within)
    without = without - 2 * (between.sum() - between) / (pairs_between.sum() - pairs_between)
    return n * whole - (n - 1) * without + fixed / pairs_fixed


def _row_sums(
    x: Tensor, y: Tensor, x_groups: Sequence[Hashable], y_groups: Sequence[Hashable]
) -> tuple[Tensor, Tensor]:
    """Sums of the kernel over pairs of different groups, for each row of `x`, and the numbers of pairs."""
    number = {group: i for i, group in enumerate({*x_groups, *y_groups})}
    a, b = (torch.tensor([number[g] for g in groups], device=x.device) for groups in (x_groups, y_groups))
    apart = a[:, None] != b
    return (poly_kernel(x, y) * apart).sum(1), apart.sum(1)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The Frechet distance of two Gaussians fitted to features `(N, d)` and `(M, d)` (Heusel et al. 2017).

    It is biased. Two sets from one Gaussian with variance v in each of d directions, one of them of n
    images and the other much larger, are apart by about v d (d + 5) / (4 n) instead of 0. Report n and d with
    it, and compare only sets of one size. Raises ValueError if a set has d images or fewer, since its
    covariance would be singular; NonFiniteError for features that are not finite.
    """
    n, d = min(len(features), len(reference)), features.shape[1]
    if n <= d:
        raise ValueError(f"a Frechet distance of {d} features needs more than {d} images, not {n}")
    require_finite("features of images", features, reference)
    x, y = features.double(), reference.double()
    covariance_x, covariance_y = torch.cov(x.T), torch.cov(y.T)
    # tr sqrt(A B) = sum of the square roots of the eigenvalues of A B.
    cross = torch.linalg.eigvals(covariance_x @ covariance_y).sqrt().real.sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return (mean + covariance_x.trace() + covariance_y.trace() - 2 * cross).item()
