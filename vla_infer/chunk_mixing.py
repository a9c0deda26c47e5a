"""One plan out of several action chunks: interpolation between rows, blending, temporal ensembling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .chunk import Chunk

FloatArray = npt.NDArray[np.float64]
_ROUNDING = 1e-6  # rows: an instant this close before a row counts as the row, as Chunk.row_at has it


def at(chunk: Chunk, now: float, *, linear: bool) -> FloatArray:
    """Commands (A,) of one chunk at `now`: between two rows, or the row that is due; its ends outside."""
    place = min(max((now - chunk.observed_at) / chunk.period + _ROUNDING, 0.0), chunk.steps - 1.0)
    row = int(place)
    if not linear or row + 1 >= chunk.steps:
        row_values: FloatArray = chunk.commands[row]
        return row_values
    part = max(place - row - _ROUNDING, 0.0)
    low, high = chunk.commands[row], chunk.commands[row + 1]
    mixed: FloatArray = low * (1.0 - part) + high * part  # never high - low, which may overflow
    return mixed


def rows_at(chunk: Chunk, values: FloatArray, times: FloatArray, *, linear: bool) -> FloatArray:
    """(T, A): `values`, the chunk's commands or actions (H, A), at each of `times` (T,); its ends outside."""
    place = np.clip((times - chunk.observed_at) / chunk.period + _ROUNDING, 0.0, chunk.steps - 1.0)
    row = place.astype(np.int64)
    if not linear:
        return values[row]
    above = np.minimum(row + 1, chunk.steps - 1)
    part = np.maximum(place - row - _ROUNDING, 0.0)[:, None]
    mixed: FloatArray = values[row] * (1.0 - part) + values[above] * part
    return mixed


def due_times(chunk: Chunk) -> FloatArray:
    """(H,): when each row is due, s on the steady clock."""
    times: FloatArray = chunk.observed_at + np.arange(chunk.steps, dtype=np.float64) * chunk.period
    return times


def blend(old: Chunk, new: Chunk, now: float, *, steps: float, linear: bool) -> Chunk:
    """`new`, reached from `old` by a weight that grows linearly from 0 at `now` to 1 after `steps` rows.

    The overlap may be shorter: the weight is 1 where the old chunk's last row is due. Rows that are past
    are the old chunk's, so that what is interpolated from them starts where the old one was.
    """
    span = min(steps * new.period, old.due(old.steps - 1) - now)
    if span <= 0.0:
        return new
    times = due_times(new)
    weight = np.clip((times - now) / span, 0.0, 1.0)[:, None]
    before = rows_at(old, old.commands, times, linear=linear)
    return replace(new, commands=before * (1.0 - weight) + new.commands * weight)


def ensemble(chunks: Sequence[Chunk], *, decay: float, linear: bool) -> Chunk:
    """Temporal ensembling (Zhao et al., arXiv 2304.13705): at each of the newest chunk's times, the mean
    of what every chunk, oldest first, says for that time, with weights exp(-decay * i), i = 0 the oldest.
    """
    newest = chunks[-1]
    times = due_times(newest)
    total = np.zeros_like(newest.commands)
    weights = np.zeros((newest.steps, 1))
    for index, chunk in enumerate(chunks):
        weight = np.exp(-decay * index)
        covered = (times <= chunk.due(chunk.steps - 1) + _ROUNDING * chunk.period)[:, None] * weight
        # The mean is formed step by step, so that no sum can exceed the largest of its parts.
        weights = weights + covered
        share = np.divide(covered, weights, out=np.zeros_like(weights), where=weights > 0.0)
        total = total * (1.0 - share) + rows_at(chunk, chunk.commands, times, linear=linear) * share
    return replace(newest, commands=total)
