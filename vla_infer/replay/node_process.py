"""The node as it is, watched: what happened in it is written to a file when it ends.

python -m vla_infer.replay.node_process TRACE.npz --ros-args -p policy:=DIRECTORY -p contract:=so101
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Header

from vla_infer.chunk import Chunk
from vla_infer.frame import Frame, Now, Readiness
from vla_infer.heap import keep_heap
from vla_infer.motion import Motion, Outgoing
from vla_infer.node import VlaNode, run
from vla_infer.node_support import make_executor
from vla_infer.rtc import Rtc
from vla_infer.stats import Counts
from vla_infer.stop_signals import stop_on_signals

from .direct import Images, tick_record
from .trace import observation_key, seed_of

CHUNK_TOPIC = "/replay/chunk"


class WatchedPolicy:
    """A policy whose noise is seeded by the observation, and that remembers its last call."""

    def __init__(self, policy: Any, load: float) -> None:
        self._policy = policy
        self.load = load
        self.info = policy.info
        self.last: tuple[str, float, float, float, Any] = ("", 0.0, 0.0, 0.0, None)

    def predict(self, images: Images, state: Any, task: str, *, rtc: Rtc | None = None) -> Any:
        key = observation_key(images, state, task)
        self._policy.seed(seed_of(key))
        actions = self._policy.predict(images, state, task, rtc=rtc)
        timing = self._policy.timing
        self.last = (key, timing.preprocess, timing.engine, timing.postprocess, np.array(actions, np.float32))
        return actions

    def close(self) -> None:
        self._policy.close()


class Recording:
    """An Observer of the node that keeps everything and writes it in one go."""

    def __init__(self) -> None:
        self.policy: WatchedPolicy | None = None
        self.publisher: Any = None  # of a std_msgs/Header for each chunk, so that a sweep can count them
        self._inferences: list[tuple[float, ...]] = []
        self._keys: list[str] = []
        self._actions: list[Any] = []
        self._ticks: list[tuple[float, ...]] = []
        self._values: list[Any] = []
        self._reasons: list[str] = []
        self._received: list[tuple[str, int, int]] = []
        self._motion: Motion | None = None
        self._counts: Counts | None = None

    def load(self, path: str, **options: Any) -> WatchedPolicy:
        """In place of vla_infer.load_policy."""
        from vla_infer.policy import load_policy

        began = time.perf_counter()
        policy = load_policy(path, **options)
        self.policy = WatchedPolicy(policy, time.perf_counter() - began)
        return self.policy

    def configured(self, motion: Motion, counts: Counts) -> None:
        self._motion, self._counts = motion, counts

    def received(self, topic: str, stamp: int, now: Now) -> None:
        self._received.append((topic, stamp, now.ros))

    def inferred(self, frame: Frame, chunk: Chunk, taken: Now, ready: Now, decode: float) -> None:
        assert self.policy is not None
        key, preprocess, engine, postprocess, actions = self.policy.last
        took = ready.steady - taken.steady
        self._keys.append(key)
        self._actions.append(actions)
        if self.publisher is not None:
            self.publisher.publish(Header(frame_id=str(frame.sequence)))
        self._inferences.append(
            (frame.sequence, frame.stamp, taken.ros, took, decode, preprocess, engine, postprocess)
        )

    def ticked(self, now: Now, lateness: float, out: Outgoing, readiness: Readiness) -> None:
        tick = tick_record(now.steady, lateness, out, readiness)
        chunk = -1 if tick.chunk is None else tick.chunk
        age = np.nan if tick.age is None else tick.age
        self._ticks.append((now.ros, lateness, chunk, tick.row, age, tick.held))
        self._values.append(tick.values)
        self._reasons.append(tick.reason)

    def write(self, path: Path) -> None:
        """Arrays of every inference and tick, and a JSON text `meta` with the counts."""
        width = next((v.size for v in self._values if v is not None), 0)
        missing = np.full(width, np.nan)
        meta = {
            "load": self.policy.load if self.policy else 0.0,
            "info": vars(self.policy.info) if self.policy else None,
            "verdicts": {},
            "guard": {},
            "counts": self._counts.snapshot() if self._counts else {},
        }
        if self._motion is not None:
            verdicts = self._motion.scheduler.verdicts
            meta["verdicts"] = {verdict.name.lower(): n for verdict, n in verdicts.items()}
            meta["guard"] = dict(self._motion.guard.counts)
        np.savez(
            path,
            inferences=np.array(self._inferences, np.float64).reshape(-1, 8),
            stamps=np.array([[row[1], row[2]] for row in self._inferences], np.int64).reshape(-1, 2),
            keys=np.array(self._keys, dtype="U16"),
            actions=np.array(self._actions, np.float32),
            ticks=np.array(self._ticks, np.float64).reshape(-1, 6),
            tick_times=np.array([row[0] for row in self._ticks], np.int64),
            values=np.array([missing if v is None else v for v in self._values], np.float64),
            reasons=np.array(self._reasons, dtype="U40"),
            received_topics=np.array([row[0] for row in self._received], dtype="U200"),
            received=np.array([row[1:] for row in self._received], np.int64).reshape(-1, 2),
            meta=np.array(json.dumps(meta, default=str)),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """As the node's own main, but that the recording is written before the policy is let go."""
    words = list(sys.argv[1:] if argv is None else argv)
    recording, stop = Recording(), stop_on_signals()
    keep_heap()
    rclpy.init(args=words[1:], signal_handler_options=SignalHandlerOptions.NO)
    node = VlaNode(policy_loader=recording.load, stop=stop, observer=recording)
    recording.publisher = node.create_publisher(Header, CHUNK_TOPIC, 100)
    sys.setswitchinterval(0.0005)
    run(node, make_executor())
    recording.write(Path(words[0]))
    node.close()
    rclpy.try_shutdown()
    if node.thread_left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(node.exit_status)  # an inference is under way and cannot be ended
    return node.exit_status


if __name__ == "__main__":
    sys.exit(main())
