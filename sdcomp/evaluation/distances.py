"""Distances between sets of images, from their features."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_kernel

from sdcomp.evaluation.statistics import require_finite


def kid_values(features: Tensor, reference: Tensor, paired: bool = False) -> Tensor:
    """The contribution of each image to the Kernel Inception Distance, `(N,)`; their mean is the KID.

    KID is the unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3 (Binkowski et al.
    2018) between `features` `(N, d)` and `reference` `(M, d)`, here over all images instead of random
    subsets. The contributions are jackknife pseudo-values (Efron & Stein 1981) for a fixed reference, so
    that they have intervals and paired differences like any other score. With `paired`, row i of both sets
    has the same prompt and noise; such pairs are not independent and are left out.

    Raises ValueError for fewer than three images, for features of different sizes, and for `paired` sets of
    different sizes; NonFiniteError for features that are not finite.
    """
    n, m = len(features), len(reference)
    if n < 3 or m < 3:
        raise ValueError(f"KID needs at least 3 images on each side, not {n} and {m}")
    if features.shape[1] != reference.shape[1] or (paired and n != m):
        raise ValueError(f"features {tuple(features.shape)} do not fit reference {tuple(reference.shape)}")
    require_finite("features of images", features, reference)
    x, y = features.double(), reference.double()
    within = poly_kernel(x, x).fill_diagonal_(0).sum(1)
    between = poly_kernel(x, y)
    between = between.fill_diagonal_(0).sum(1) / (m - 1) if paired else between.mean(1)
    fixed = poly_kernel(y, y).fill_diagonal_(0).sum() / (m * (m - 1))
    whole = within.sum() / (n * (n - 1)) - 2 * between.mean()
    without = (within.sum() - 2 * within) / ((n - 1) * (n - 2))
    without = without - 2 * (between.sum() - between) / (n - 1)
    return n * whole - (n - 1) * without + fixed


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """The Frechet distance of two Gaussians fitted to features `(N, d)` and `(M, d)` (Heusel et al. 2017).

    Its bias is about +d / n: report n and d with it, and compare only sets of one size. Raises ValueError
    if a set has d images or fewer, since its covariance would be singular; NonFiniteError for features that
    are not finite.
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
