"""Where the age of a command comes from: its parts, which add up to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PARTS = (
    "capture → start of inference: all cameras there, transport",
    "inference: decode to chunk",
    "chunk → first control tick that plays it",
    "first tick → this tick of the same chunk",
    "tick → command received",
)
_AROUND_P99 = (98.5, 99.5)  # percentiles of the age
_SHORTEST = 200  # commands, so that there is one around p99


def parts(document: dict[str, Any]) -> npt.NDArray[np.float64]:
    """(N, 5) ms, the PARTS of the age of each of a report's N commands whose inference it has."""
    ran, ticks = document["trace"]["inferences"], document["trace"]["ticks"]
    times = zip(ran["stamp"], ran["taken"], ran["ready"], strict=True)
    known = dict(zip(ran["sequence"], times, strict=True))
    first: dict[int, float] = {}
    rows = []
    for time, age, chunk in zip(ticks["time"], ticks["age_ms"], ticks["chunk"], strict=True):
        if age is None or chunk not in known:
            continue
        stamp, taken, ready = known[chunk]
        played = first.setdefault(chunk, time)
        steps = np.diff([stamp, taken, ready, played, time]) * 1e3
        rows.append([*steps, age - (time - stamp) * 1e3])
    return np.array(rows, np.float64).reshape(-1, len(PARTS))


def split(document: dict[str, Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """(5,) and (5,) ms: means of the PARTS over all commands, and over those whose age is around p99 (98.5 to 99.5 %).

    None for a run of fewer than 200 commands, and in direct mode, where nobody receives a command and its age counts
    from the observation's oldest part, a joint state it may be.
    """
    found = parts(document)
    if document["mode"] == "direct" or len(found) < _SHORTEST:
        return None
    age = found.sum(axis=1)
    low, high = np.percentile(age, _AROUND_P99)
    return found.mean(axis=0), found[(low <= age) & (age <= high)].mean(axis=0)
