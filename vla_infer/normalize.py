"""Normalisation of states and actions with a policy's statistics, in float32 as LeRobot computes it.

    IDENTITY    y = x
    MEAN_STD    y = (x - mean) / (std + eps)            x = y * std + mean
    MIN_MAX     y = 2 (x - min) / d - 1                 x = (y + 1) * d / 2 + min,    d = max - min
    QUANTILES   y = 2 (x - q01) / d - 1                 x = (y + 1) * d / 2 + q01,    d = q99 - q01
    QUANTILE10  the same with q10 and q90

where d is eps in the dimensions in which it would be 0, and eps is not part of the MEAN_STD inverse (LeRobot
0.6, processor/normalize_processor.py). All of it is elementwise over the last axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.errors import CheckpointError

Array = npt.NDArray[np.float32]

_BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


@dataclass(frozen=True)
class Normalizer:
    """One feature's mode and the two statistics that it needs, each (dim,) float32; None for IDENTITY.

    `first` is mean, or the lower bound; `second` is std, or the difference of the bounds.
    """

    mode: str
    eps: np.float32
    first: Array | None = None
    second: Array | None = None

    def normalize(self, values: Array) -> Array:
        """Robot units → model units, (..., dim) float32."""
        if self.first is None or self.second is None:
            return values
        if self.mode == "MEAN_STD":
            result: Array = (values - self.first) / (self.second + self.eps)
        else:
            result = np.float32(2) * (values - self.first) / self.second - np.float32(1)
        return result

    def unnormalize(self, values: Array) -> Array:
        """Model units → robot units, (..., dim) float32."""
        if self.first is None or self.second is None:
            return values
        if self.mode == "MEAN_STD":
            result: Array = values * self.second + self.first
        else:  # halving is exact, so its place in the product does not matter
            result = (values + np.float32(1)) * self.second / np.float32(2) + self.first
        return result


def make_normalizer(
    mode: str, key: str, dim: int, stats: Mapping[str, Array], *, eps: float, where: str
) -> Normalizer:
    """A feature's normaliser from the statistics of a processor.

    Args:
        mode: one of the modes above.
        key: feature name; its statistics are `stats["<key>.<statistic>"]`, each of shape (dim,).
        dim: values in the feature.
        stats: what the processor's state file holds.
        eps: as the processor's configuration states it.
        where: for messages.

    Raises:
        CheckpointError: a statistic is missing, has another shape, is not finite or has no sense.
    """
    small = np.float32(eps)
    if not 0 < float(small) < 1:
        raise CheckpointError(f"{where}: eps: expected a number above 0 and below 1, got {eps!r}")
    if mode == "IDENTITY":
        return Normalizer(mode, small)
    low_name, high_name = _BOUNDS.get(mode, ("mean", "std"))
    low = _statistic(stats, key, low_name, dim, f"{where}: {mode}")
    high = _statistic(stats, key, high_name, dim, f"{where}: {mode}")
    if mode == "MEAN_STD":
        if bool((high < 0).any()):
            raise CheckpointError(f"{where}: {key}.std has a negative value")
        return Normalizer(mode, small, low, high)
    with np.errstate(over="ignore"):
        span = high - low
    if bool((span < 0).any()) or not bool(np.isfinite(span).all()):
        raise CheckpointError(
            f"{where}: {key}: {low_name} is above {high_name} in a dimension, or far below it"
        )
    return Normalizer(mode, small, low, np.where(span == 0, small, span))


def _statistic(stats: Mapping[str, Array], key: str, name: str, dim: int, where: str) -> Array:
    value = stats.get(f"{key}.{name}")
    if value is None:
        raise CheckpointError(
            f"{where} of {key} needs {key}.{name}, which the state file lacks; a base policy has no "
            "statistics of your robot: fine-tune it, or save it with those of your data set"
        )
    if value.shape != (dim,):
        raise CheckpointError(f"{where}: {key}.{name}: expected shape ({dim},), got {value.shape}")
    if not bool(np.isfinite(value).all()):
        raise CheckpointError(f"{where}: {key}.{name} has a value that is not finite")
    return value
