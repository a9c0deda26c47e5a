"""The node's own parts under simulated time: real messages in at its subscriptions, real messages out.

Everything between a subscription's callback and a publisher is the product, put together by its own
`assemble`; what is simulated is the clock, the order of events and how long an inference takes. So a trial
of some seconds takes some milliseconds, and hundreds of seeded ones are affordable and exact.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import yaml
from robot import ROOT

from vla_infer.codecs import CODECS, COMMAND_CODECS, JointSample
from vla_infer.contract import Contract, parse_contract
from vla_infer.failsafe import Level
from vla_infer.frame import Now
from vla_infer.node_assembly import Surroundings, assemble
from vla_infer.node_inference import Inference
from vla_infer.node_parameters import PARAMETERS, Settings
from vla_infer.node_safety import EmergencyStop
from vla_infer.node_support import Reporter

P = 0.02  # s, the control period
AGE = 0.1  # s, max_observation_age in these tests
FRAME = 1 / 30
ROS_START = 1_700_000_000_000_000_000
CAMERAS = ("top/image_raw", "wrist/image_raw")
PIXELS = np.full((4, 6, 3), 90, dtype=np.uint8)


class Ended(BaseException):
    """The process would have ended: raised out of an inference that never returns."""


class Clock:
    """Steady time that only moves when it is told to, and ROS time that may be set apart from it."""

    steady_clock = None

    def __init__(self) -> None:
        self.time = 1000.0
        self.offset = ROS_START - round(self.time * 1e9)

    def steady(self) -> float:
        return self.time

    def thread_time(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def now(self) -> Now:
        return Now(self.time, round(self.time * 1e9) + self.offset)


@dataclass
class Publisher:
    """Keeps what is published, with the steady time."""

    type: Any
    clock: Clock
    sent: list[tuple[float, Any]]

    def publish(self, message: Any) -> None:
        self.sent.append((self.clock.time, message))

    def wait_for_all_acked(self, timeout: Any) -> bool:
        return True


@dataclass
class Timer:
    period: float

    def time_until_next_call(self) -> int:
        return round(self.period * 1e9)


class Node:
    """As much of a ROS node as the parts ask for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.callbacks: dict[str, Callable[[Any], None]] = {}
        self.publishers: dict[str, Publisher] = {}
        self.timers: list[Timer] = []
        self.services: dict[str, Callable[[Any, Any], Any]] = {}

    def create_subscription(self, kind: Any, topic: str, callback: Any, qos: Any) -> str:
        self.callbacks[topic] = callback
        return topic

    def create_lifecycle_publisher(self, kind: Any, topic: str, qos: Any) -> Publisher:
        self.publishers[topic] = Publisher(kind, self._clock, [])
        return self.publishers[topic]

    def create_service(self, kind: Any, name: str, callback: Any) -> None:
        self.services[name] = callback

    def create_timer(self, period: float, callback: Callable[[], None], clock: Any) -> Any:
        self.timers.append(Timer(period))
        return self.timers[-1]

    def destroy_timer(self, timer: Any) -> None:
        self.timers.remove(timer)

    def destroy_subscription(self, topic: str) -> None:
        del self.callbacks[topic]

    def destroy_lifecycle_publisher(self, publisher: Publisher) -> None:
        pass


class Logger:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    warning = error = info


class SteppedInference(Inference):
    """The inference without its thread; the world steps it as the thread would."""

    def __init__(self, policy: Any, source: Any, *, reporter: Reporter) -> None:
        super().__init__(policy, source, reporter=reporter, pause=policy.wait)

    def stop(self, timeout: float) -> bool:
        self.close_policy()
        return True


class Policy:
    """Answers with the joint angles it sees, row i being `slope` * i degrees further, after `duration` s."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.duration: Callable[[], float] = lambda: 0.06
        self.slope = 0.3
        self.calls: list[tuple[float, np.ndarray, str]] = []
        self.change: Callable[[np.ndarray], np.ndarray] = lambda actions: actions
        self.closed = False
        self.info = type(
            "Info",
            (),
            {
                "family": "standin", "device": "cuda:0",
                "cameras": ("observation.images.top", "observation.images.wrist"),
                "state_dim": 6, "action_dim": 6, "horizon": 30, "weight_bytes": 0,
            },
        )()  # fmt: skip

    def wait(self, seconds: float) -> None:
        self._world.run(seconds)

    def predict(self, images: dict[str, np.ndarray], state: np.ndarray, task: str) -> np.ndarray:
        self.calls.append((self._world.clock.time, state, task))
        self.wait(self.duration())
        rows = np.arange(self.info.horizon, dtype=np.float32)[:, None] * self.slope
        return self.change((state + rows).astype(np.float32))

    def close(self) -> None:
        self.closed = True


class World:
    """Cameras at 30 Hz, joint states at 50 Hz, control ticks at 50 Hz, each with jitter from the seed.

    filters: topic -> function that may change, drop (None) or multiply (list) a message on its way.
    """

    def __init__(self, seed: int, *, document: dict[str, Any] | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.clock = Clock()
        self.node = Node(self.clock)
        self.logger = Logger()
        self.reporter = Reporter(self.logger, self.clock)
        self.emergency = EmergencyStop(self.node, self.reporter)
        self.stops: list[tuple[float, Level, str]] = []
        self.policy = Policy(self)
        self.contract = contract(document or {})
        values = {row.name: row.default for row in PARAMETERS} | {"dry_run": False}
        around = Surroundings(self.node, self.reporter, self.emergency, self._stop)
        self.running = assemble(
            around,
            Settings(**values),  # type: ignore[arg-type]
            self.contract,
            self.policy,
            make_worker=SteppedInference,  # type: ignore[arg-type]
        )
        self.control, self.motion = self.running.control, self.running.control.motion
        self.filters: dict[str, Callable[[Any], Any]] = {}
        self.position = dict.fromkeys(self.contract.states[0].joints, 0.1)
        self.frames: list[float] = []  # steady times at which both cameras had delivered a new image
        self.ticks: list[tuple[float, bool, str]] = []  # time, held or nothing sent, why
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._inferring = False
        self._stamps: dict[str, float] = {}
        for topic in CAMERAS:
            self._later(float(self.rng.uniform(0, 0.005)), lambda topic=topic: self._camera(topic))
        self._later(0.001, self._joints)
        self.control.start()
        self.running.worker.enable()
        self._grid = self.clock.time
        self._later_tick()

    # ------------------------------------------------------------------ events
    def _later(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.time + seconds, next(self._order), event))

    def run(self, seconds: float) -> None:
        """Let time pass. Called again from within an inference, it lets its duration pass."""
        end = self.clock.time + seconds
        while self._events and self._events[0][0] <= end:
            at, _, event = heapq.heappop(self._events)
            self.clock.time = max(at, self.clock.time)
            event()
            self._infer()
        self.clock.time = max(end, self.clock.time)

    def until(self, condition: Callable[[], bool], *, limit: float = 20.0) -> float:
        """Run to the tick at which `condition` holds; the time that took."""
        began = self.clock.time
        while not condition():
            assert self.clock.time - began < limit, self.logger.lines[-5:]
            self.run(P / 4)
        return self.clock.time - began

    def _infer(self) -> None:
        if self._inferring:
            return
        self._inferring = True
        try:
            # One at a time: a policy that is always busy must not keep `run` from its end.
            if self.running.worker._enabled:
                self.running.worker.step()
        finally:
            self._inferring = False

    def _stop(self, level: Level, reason: str) -> None:
        self.stops.append((self.clock.time, level, reason))
        self.running.worker.disable()
        self.control.stop()
        if level >= Level.EXIT:
            raise Ended

    # --------------------------------------------------------------- publishers
    def _later_tick(self) -> None:
        self._grid += P
        self._later(self._grid + abs(float(self.rng.normal(0, 0.0005))) - self.clock.time, self._tick)

    def _tick(self) -> None:
        self._later_tick()
        if self.node.timers:
            self.control.turn()
            self.ticks.append((self.clock.time, bool(self.control.holding), self.control.holding))

    def _camera(self, topic: str) -> None:
        # A hundredth of the period of jitter, and some milliseconds under way.
        self._later(FRAME + float(self.rng.normal(0, FRAME / 100)), lambda: self._camera(topic))
        self.send_image(topic)

    def _joints(self) -> None:
        self._later(0.02, self._joints)
        self.send_joints()

    def send_image(self, topic: str, *, stamp: int | None = None) -> None:
        taken = self.clock.now().ros - round(float(self.rng.uniform(0.001, 0.004)) * 1e9)
        message = CODECS["sensor_msgs/msg/Image"].encode(PIXELS, taken if stamp is None else stamp, "")
        if self.deliver(topic, message):
            self._stamps[topic] = self.clock.time
            if len(self._stamps) == len(CAMERAS):
                self._stamps.clear()
                self.frames.append(self.clock.time)

    def send_joints(self) -> None:
        sample = JointSample(tuple(self.position), np.array(list(self.position.values())), None, None)
        message = CODECS["sensor_msgs/msg/JointState"].encode(sample, self.clock.now().ros, "")
        self.deliver("joint_states", message)

    def deliver(self, topic: str, message: Any) -> bool:
        """A message arrives at the node's own callback; False where a filter drops it."""
        changed = self.filters[topic](message) if topic in self.filters else message
        for item in changed if isinstance(changed, list) else [changed]:
            if item is not None:
                self.node.callbacks[topic](item)
        return changed is not None

    # ------------------------------------------------------------------ results
    @property
    def sent(self) -> list[tuple[float, np.ndarray]]:
        """(steady time, values) of everything on the first command topic."""
        sink = self.contract.commands[0]
        decode = COMMAND_CODECS[sink.type].decode
        return [(at, decode(message).values[0]) for at, message in self.node.publishers[sink.topic].sent]

    @property
    def rejected(self) -> int:
        counts = self.reporter.counts.snapshot()
        return sum(count for name, count in counts.items() if name.startswith("rejected "))

    def warm_up(self) -> None:
        """Until it has been playing for half a second."""
        self.until(lambda: bool(self.ticks) and not self.ticks[-1][1])
        self.run(0.5)
        assert not self.ticks[-1][1], self.ticks[-1]

    def check(self) -> None:
        """What has to hold in every trial: limits, steps, no error of our own."""
        limits = self.contract.commands[0].limits
        values = np.array([row for _, row in self.sent])
        if len(values):
            low, high = (
                np.array([limit.position[end] for limit in limits if limit.position]) for end in (0, 1)
            )
            speed = np.array([limit.velocity or np.inf for limit in limits])
            assert np.isfinite(values).all()
            assert ((values >= low) & (values <= high)).all()
            assert (np.abs(np.diff(values, axis=0)) <= speed * P).all()
        assert self.reporter.counts["internal_errors"] == 0, self.logger.lines


@cache
def so101() -> Any:
    return yaml.safe_load((ROOT / "config" / "so101.yaml").read_text())


def contract(change: dict[str, Any]) -> Contract:
    return parse_contract({**so101(), "max_observation_age": AGE, "sync_slop": 0.05, **change}, file="f.yaml")
