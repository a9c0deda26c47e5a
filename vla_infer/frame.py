"""One validated observation out of what the topics deliver: the newest set of messages that belong together.

`FrameBuffer` keeps the last few samples of each topic, refuses what cannot be right when it arrives, and
hands out each observation once. Pure: the time is an argument, and any thread may call it.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .codecs import CODECS, JointSample
from .contract import Contract, StateSource
from .contract_parse import readable
from .errors import ObservationError

MAX_AHEAD = 0.05  # s that a stamp may be ahead of this node's clock
CLOCK_RESTART = 1.0  # s a stamp has to go back to mean a restarted clock, not a late message
_IMAGES_KEPT = 4  # enough to find a partner for a camera half a period away
_STATES_KEPT = 256  # at 1 kHz, a quarter of a second to look back from an image


class Now(NamedTuple):
    """One instant on both clocks: `steady` in seconds for durations, `ros` in nanoseconds for stamps."""

    steady: float
    ros: int


@dataclass(frozen=True)
class Sample:
    """One accepted message. value: an image message, or the state as float32 in policy units."""

    value: Any
    stamp: int  # ns, ROS time
    received: float  # s, steady clock
    sequence: int

    def age(self, now: Now) -> float:
        """The larger of the age by the stamp and the time since receipt, in seconds."""
        return max((now.ros - self.stamp) * 1e-9, now.steady - self.received, 0.0)


@dataclass(frozen=True)
class Frame:
    """One observation. images: feature -> uint8 (H, W, 3) RGB; state: float32 (S,) in policy units.

    stamp: ROS time (ns) of its oldest image; observed_at: when its oldest part was taken, image or state (s, steady).
    """

    images: dict[str, npt.NDArray[np.uint8]]
    state: npt.NDArray[np.float32]
    stamp: int
    observed_at: float
    sequence: int


@dataclass(frozen=True)
class Readiness:
    """Whether an observation can be had now. kind: ready, missing, stale or unsynchronised."""

    kind: str
    reason: str
    age: float  # s, of the oldest part of the set; 0 where there is none

    @property
    def ready(self) -> bool:
        return self.kind == "ready"


def state_vector(source: StateSource, sample: JointSample) -> npt.NDArray[np.float32]:
    """The part of the policy's state that `source` gives: float32 (fields x joints), by joint name.

    Raises ObservationError for a joint or field that is missing and for a number that is not finite.
    """
    where = {name: index for index, name in enumerate(sample.names)}
    missing = [joint for joint in source.joints if joint not in where]
    if missing:
        got = ", ".join(sample.names) or "none"
        raise ObservationError(readable(f"joints {', '.join(missing)} are missing; got {got}"))
    order = [where[joint] for joint in source.joints]
    parts = []
    for field in source.fields:
        values = getattr(sample, field)
        if values is None:
            raise ObservationError(f"the message has no {field}; its publisher leaves it out")
        picked = values[order]
        if not np.isfinite(picked).all():
            bad = source.joints[int(np.flatnonzero(~np.isfinite(picked))[0])]
            raise ObservationError(f"{field} of '{bad}' is not finite")
        if field == "position":
            with np.errstate(over="ignore"):
                picked = source.units.to_policy(picked)
        elif field == "velocity":
            picked = picked * np.asarray(source.units.scale)
        parts.append(picked)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
        vector = np.concatenate(parts).astype(np.float32)
    if not np.isfinite(vector).all():
        raise ObservationError(f"a number is too large: {np.abs(np.concatenate(parts)).max():.3g}")
    return vector


class _Ring:
    """The last samples of one topic, in the order of their stamps."""

    def __init__(self, topic: str, kept: int) -> None:
        self.topic = topic
        self.samples: deque[Sample] = deque(maxlen=kept)
        self.count = 0  # accepted so far
        self.used = 0  # sequence of the newest that went into a frame

    def add(self, value: Any, stamp: int, now: Now) -> None:
        ahead = (stamp - now.ros) * 1e-9
        if stamp == 0:
            raise ObservationError(
                "header.stamp is zero; stamp it in the driver, or say stamp: receipt in the contract"
            )
        if ahead > MAX_AHEAD:
            raise ObservationError(
                f"header.stamp is {ahead:.3f} s ahead of this node's clock; synchronise the clocks"
            )
        if self.samples:
            back = (self.samples[-1].stamp - stamp) * 1e-9
            if back >= CLOCK_RESTART:
                self.samples.clear()
            elif back == 0.0:
                raise ObservationError(
                    "header.stamp is that of the message before; the driver repeats itself"
                )
            elif back > 0.0:
                raise ObservationError(f"header.stamp goes back by {back:.3f} s; the message is out of order")
        self.count += 1
        self.samples.append(Sample(value, stamp, now.steady, self.count))

    def nearest(self, stamp: int) -> Sample:
        """The sample whose stamp is nearest to `stamp`; the newer of two that are equally near."""
        best = self.samples[-1]
        for sample in reversed(self.samples):
            if abs(sample.stamp - stamp) < abs(best.stamp - stamp):
                best = sample
            if sample.stamp <= stamp:
                break
        return best


class FrameBuffer:
    """Collects samples by topic and gives out the newest consistent set, each at most once."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._lock = threading.Lock()
        self._images = {camera.feature: _Ring(camera.topic, _IMAGES_KEPT) for camera in contract.cameras}
        self._types = {camera.feature: camera.type for camera in contract.cameras}
        self._states = [_Ring(source.topic, _STATES_KEPT) for source in contract.states]
        self._frames = 0
        self.dropped = 0  # images that a newer one replaced before they were used

    def add_image(self, feature: str, message: Any, stamp: int, now: Now) -> None:
        """Keep an image message whose header has been checked. Raises ObservationError for its stamp."""
        with self._lock:
            self._images[feature].add(message, stamp, now)

    def add_state(self, index: int, sample: JointSample, stamp: int, now: Now) -> None:
        """Keep the state of source `index`. Raises ObservationError for its stamp or its joints."""
        vector = state_vector(self._contract.states[index], sample)
        with self._lock:
            self._states[index].add(vector, stamp, now)

    @property
    def arrivals(self) -> int:
        """Observations that arrived so far: images of the camera that delivered the fewest, of those that
        may not be missing. Never decreases."""
        with self._lock:
            needed = [
                ring.count
                for feature, ring in self._images.items()
                if feature not in self._contract.allow_missing_cameras
            ]
            return min(needed or [ring.count for ring in self._images.values()])

    def states(self) -> list[npt.NDArray[np.float32] | None]:
        """The newest state of each source in policy units, None before the first."""
        with self._lock:
            return [ring.samples[-1].value if ring.samples else None for ring in self._states]

    def recent(self, now: Now) -> list[tuple[list[float], list[float]]]:
        """Of each topic, cameras before states: when its last samples arrived (s, steady) and their ages (s)."""
        with self._lock:
            rings = [*self._images.values(), *self._states]
            return [
                (
                    [sample.received for sample in ring.samples],
                    [(now.ros - sample.stamp) * 1e-9 for sample in ring.samples],
                )
                for ring in rings
            ]

    def clear(self) -> None:
        """Forget every sample, as after a jump of the clock."""
        with self._lock:
            for ring in (*self._images.values(), *self._states):
                ring.samples.clear()

    def readiness(self, now: Now) -> Readiness:
        """Whether a set could be had now, new or not, and if not which topic is at fault."""
        with self._lock:
            return self._select(now)[0]

    def take(self, now: Now) -> Frame | None:
        """The newest consistent observation, decoded; None when there is none or it was taken before.

        Raises ObservationError, naming the topic, for an image that cannot be decoded; it is not
        tried again.
        """
        with self._lock:
            readiness, images, states = self._select(now)
            if not readiness.ready or all(
                sample.sequence <= self._images[feature].used for feature, sample in images.items()
            ):
                return None
            for feature, sample in images.items():
                ring = self._images[feature]
                self.dropped += max(0, sample.sequence - ring.used - 1)
                ring.used = max(ring.used, sample.sequence)
            self._frames += 1
            sequence = self._frames
        decoded = {}
        for feature, sample in images.items():
            try:
                decoded[feature] = CODECS[self._types[feature]].decode(sample.value)
            except ObservationError as error:
                raise ObservationError(f"{self._images[feature].topic}: {error}") from error
        return Frame(
            images=decoded,
            state=np.concatenate([sample.value for sample in states]),
            stamp=min(sample.stamp for sample in images.values()),
            observed_at=now.steady - readiness.age,
            sequence=sequence,
        )

    def _select(self, now: Now) -> tuple[Readiness, dict[str, Sample], list[Sample]]:
        """The newest set within sync_slop: around the oldest of the cameras' newest images."""
        contract = self._contract
        rings: dict[str, _Ring] = {}
        for feature, ring in (*self._images.items(), *((str(i), r) for i, r in enumerate(self._states))):
            problem = _problem(ring, now, contract.max_observation_age)
            if problem is None:
                rings[feature] = ring
            elif feature not in contract.allow_missing_cameras:
                return problem, {}, []
        cameras = [feature for feature in self._images if feature in rings]
        if not cameras:
            return Readiness("missing", "no camera delivers an image", 0.0), {}, []
        behind = min(cameras, key=lambda feature: rings[feature].samples[-1].stamp)
        reference = rings[behind].samples[-1].stamp
        images = {feature: rings[feature].nearest(reference) for feature in cameras}
        states = [ring.nearest(reference) for ring in self._states]
        chosen = [(images[feature], rings[feature].topic) for feature in cameras]
        chosen += [(sample, ring.topic) for sample, ring in zip(states, self._states, strict=True)]
        (first, early), (last, late) = min(chosen, key=_stamp), max(chosen, key=_stamp)
        spread = (last.stamp - first.stamp) * 1e-9
        age = max(sample.age(now) for sample, _ in chosen)
        if spread > contract.sync_slop:
            slop = contract.sync_slop
            reason = f"{early} is {spread:.3f} s behind {late}; expected at most sync_slop {slop:g} s"
            return Readiness("unsynchronised", reason, age), {}, []
        if age > contract.max_observation_age:
            topic = rings[behind].topic
            reason = f"the newest set of images and states, that of {topic}, is {age:.3f} s old"
            return Readiness("stale", reason, age), {}, []
        return Readiness("ready", "", age), images, states


def _stamp(item: tuple[Sample, str]) -> int:
    return item[0].stamp


def _problem(ring: _Ring, now: Now, limit: float) -> Readiness | None:
    """Why the newest sample of a topic is of no use, or None."""
    if not ring.samples:
        return Readiness("missing", f"nothing usable received on {ring.topic}", 0.0)
    age = ring.samples[-1].age(now)
    if age > limit:
        reason = f"{ring.topic} is {age:.3f} s old; expected at most max_observation_age {limit:g} s"
        return Readiness("stale", reason, age)
    return None
