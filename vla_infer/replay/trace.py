"""What happened in one run, as plain records that every mode writes and every metric reads.

Times are seconds since the run's origin, on one clock: virtual in direct mode, the machine's steady clock
otherwise.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Inference:
    """One observation and what the policy made of it.

    key: digest of the observation, equal in two runs for equal input; stamp: of its oldest image;
    bag_time: the same as seconds since the bag's start; taken, ready: when inference took the
    observation and when its chunk could be had. decode ... postprocess are durations in seconds.
    actions: float32 (H, A) in policy units; cpu: processor seconds that the process spent on the call, of
    all its threads, None where other work goes on in it.
    """

    sequence: int
    key: str
    stamp: float
    bag_time: float
    taken: float
    ready: float
    decode: float
    preprocess: float
    engine: float
    postprocess: float
    actions: npt.NDArray[np.float32]
    cpu: float | None = None


@dataclass(frozen=True, eq=False)
class Tick:
    """One control tick. values: float64 (A,) in ROS units, None when nothing was sent.

    error: seconds that it came after its due time, None where time is virtual; chunk: sequence of the
    observation behind the command, None when held; age: seconds from that observation's stamp to the
    command, at its receipt where a receiver listened and else as it is sent.
    """

    time: float
    error: float | None
    values: FloatArray | None
    chunk: int | None
    row: int
    age: float | None
    held: bool
    reason: str  # why it was held: the kind of readiness, "waiting", "starved" or the failsafe's flag


@dataclass
class Trace:
    """A whole run. sent: camera topic -> times at which its images were sent (or arrived, in direct mode)."""

    mode: str
    control_rate: float
    policy_rate: float
    sent: dict[str, list[float]] = field(default_factory=dict)
    inferences: list[Inference] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)  # what became of the chunks
    guard: Counter[str] = field(default_factory=Counter)  # commands and chunks by kind of violation
    rejected: Counter[str] = field(default_factory=Counter)  # messages by topic
    reordered: Counter[str] = field(default_factory=Counter)  # messages whose stamp goes back, by topic
    failures: list[tuple[float, str]] = field(default_factory=list)  # inferences that raised
    transport: list[float] = field(default_factory=list)  # s from sending an image to the node's callback
    load: float = 0.0  # s to load the policy
    cold_start: float | None = None  # s from the start of loading to the first command
    duration: float = 0.0  # s


def observation_key(
    images: Mapping[str, npt.NDArray[np.uint8]], state: npt.NDArray[np.float32], task: str
) -> str:
    """A digest of one observation: every sixteenth pixel of every image, the state, the instruction.

    It names the observation in two runs whose stamps differ, and seeds the policy's noise, so that equal
    observations give equal actions in every mode.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(images):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(images[name][::16, ::16]).tobytes())
    digest.update(np.ascontiguousarray(state, np.float32).tobytes())
    digest.update(task.encode())
    return digest.hexdigest()


def seed_of(key: str) -> int:
    """The seed of the noise for an observation."""
    return int(key, 16)
