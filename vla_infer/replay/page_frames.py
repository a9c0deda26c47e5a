"""What the page shows besides the report's figures: camera frames, predicted chunks, what was recorded."""

from __future__ import annotations

import base64
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vla_infer.codecs import CODECS
from vla_infer.errors import ObservationError, ReplayError
from vla_infer.frame import Frame

from .agreement import Recorded
from .bag import Bag, Decoder
from .observe import Stamps, TopicMap
from .trace import Inference, Trace

SHOWN = 32  # observations with pictures
_WIDTH = 240  # pixels
_QUALITY = 72  # JPEG
_POINTS = 600  # of each recorded line


class Snapshots:
    """Keeps small pictures of up to SHOWN observations, evenly over `duration` seconds of the bag."""

    def __init__(self, duration: float) -> None:
        self._spacing = duration / SHOWN
        self._next = 0.0
        self.pictures: dict[int, dict[str, str]] = {}  # sequence -> camera -> data URI

    def add(self, frame: Frame, inference: Inference) -> None:
        if inference.bag_time < self._next or len(self.pictures) >= SHOWN:
            return
        self._next = inference.bag_time + self._spacing * 0.999
        self.pictures[inference.sequence] = {name: data_uri(image) for name, image in frame.images.items()}


def from_bag(bag: Bag, topics: TopicMap, trace: Trace) -> Snapshots:
    """Pictures of a run whose observations were decoded elsewhere: the images of the bag nearest to them."""
    ran = sorted(trace.inferences, key=lambda one: one.bag_time)
    chosen = [ran[i] for i in sorted({round(i) for i in np.linspace(0, len(ran) - 1, SHOWN)})]
    times = np.array([one.bag_time for one in chosen])
    best: dict[tuple[int, str], tuple[float, bytes, str]] = {}
    stamps, decode = Stamps(bag, topics), Decoder()
    for message in bag.messages(tuple(topics.cameras)):
        stamp = stamps.stamp(message) * 1e-9
        at = int(np.abs(times - stamp).argmin())
        distance = abs(float(times[at]) - stamp)
        place = (at, message.topic)
        if place not in best or distance < best[place][0]:
            best[place] = (distance, message.data, topics.types[message.topic])
    snapshots = Snapshots(0.0)
    for (at, topic), (_, data, kind) in sorted(best.items(), key=lambda item: item[0]):
        with suppress(ObservationError, ReplayError):
            image = CODECS[kind].decode(decode(data, kind))
            pictures = snapshots.pictures.setdefault(chosen[at].sequence, {})
            pictures[topics.cameras[topic].feature] = data_uri(image)
    return snapshots


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """A uint8 (H, W, 3) RGB image as a small JPEG in a data URI."""
    height, width = image.shape[:2]
    scale = min(1.0, _WIDTH / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    done, stream = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    return "data:image/jpeg;base64," + base64.b64encode(stream.tobytes()).decode() if done else ""


@dataclass(frozen=True, eq=False)
class PageInputs:
    """What one run leaves for its page."""

    trace: Trace
    recorded: Recorded | None
    snapshots: Snapshots

    def data(self) -> dict[str, Any]:
        """JSON-ready: observations with pictures and chunk, and what was recorded, by joint."""
        by_sequence = {one.sequence: one for one in self.trace.inferences}
        observations = [
            {
                "time": round(one.bag_time, 3),
                "pictures": pictures,
                "chunk": [[_short(v) for v in column] for column in one.actions.T],
            }
            for sequence, pictures in self.snapshots.pictures.items()
            if (one := by_sequence.get(sequence)) is not None
        ]
        return {
            "observations": observations,
            "policy_rate": self.trace.policy_rate,
            "recorded": self._recorded(),
            "first_actions": self._first_actions(),
        }

    def _recorded(self) -> dict[str, Any] | None:
        found = self.recorded
        if found is None:
            return None
        lines = []
        for times, values in zip(found.times, found.values, strict=True):
            keep = np.linspace(0, times.size - 1, min(times.size, _POINTS)).round().astype(int)
            lines.append([[round(float(t), 3) for t in times[keep]], [_short(v) for v in values[keep]]])
        return {"source": found.source, "lines": lines}

    def _first_actions(self) -> list[list[list[float | None]]]:
        """Per joint, the first action of every chunk over the stamp of its observation."""
        ran = sorted(self.trace.inferences, key=lambda one: one.bag_time)
        keep = np.linspace(0, len(ran) - 1, min(len(ran), _POINTS)).round().astype(int)
        times: list[float | None] = [round(ran[i].bag_time, 3) for i in keep]
        width = ran[0].actions.shape[1]
        return [[times, [_short(ran[i].actions[0, joint]) for i in keep]] for joint in range(width)]


def _short(value: float) -> float | None:
    """Four figures are more than a plot shows; null for what is not finite."""
    return float(f"{value:.5g}") if np.isfinite(value) else None
