"""One episode in this process: world, policy, scheduler and guard on a simulated clock, without ROS.

Cameras deliver at policy rate, commands go out at control rate, and an inference takes as long as it is said to: the
robot moves on meanwhile. Units, joint order, limits and modes are the contract's, through the node's own code.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vla_infer.chunk import ActionLayout, Chunk
from vla_infer.codecs import JointSample
from vla_infer.contract import Contract
from vla_infer.errors import ContractError, ObservationError
from vla_infer.failsafe import Flag
from vla_infer.frame import Frame, state_vector
from vla_infer.motion import Motion, measured_positions
from vla_infer.rtc import Rtc
from vla_infer.sim.expert import RATE, Expert
from vla_infer.sim.model import JOINTS
from vla_infer.sim.tasks import KINDS, Task, with_colour
from vla_infer.sim.world import World

TIME_LIMIT = 10.0  # s
_NOISE_SEEDS = 1_000_003  # from one episode's first seed of the noise to the next's


class Predictor(Protocol):
    """The part of vla_infer.Policy that an episode uses."""

    def seed(self, value: int) -> None: ...
    def predict(
        self,
        images: dict[str, npt.NDArray[np.uint8]],
        state: npt.NDArray[np.float32],
        task: str,
        *,
        rtc: Rtc | None = None,
    ) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class Episode:
    """What to try. seed: of the scene, in split "eval" unless told; latency: s from observation to chunk;
    wrong_instruction: name the colour of another cube of the scene."""

    seed: int
    kinds: tuple[str, ...] = KINDS
    latency: float = 0.0
    wrong_instruction: bool = False
    time_limit: float = TIME_LIMIT
    split: str = "eval"


@dataclass
class Outcome:
    """What came of one episode.

    success: of the scene's own task; obeyed: of what the instruction said, another where that was swapped.
    seconds: simulated, until either or the end; squared_jerk: mean over time and joints of the measured motion's
    third derivative squared, rad²/s⁶. guard: what the guard changed or refused, by kind.
    """

    seed: int
    kind: str
    said: str
    success: bool = False
    obeyed: bool = False
    seconds: float = 0.0
    squared_jerk: float = 0.0
    inferences: int = 0
    failures: int = 0
    held_ticks: int = 0
    ticks: int = 0
    guard: Counter[str] = field(default_factory=Counter)


def run_policy(world: World, policy: Predictor, contract: Contract, episode: Episode) -> Outcome:
    """Let a policy try an episode."""
    return _PolicyRun(world, policy, contract, episode).run()


def run_expert(world: World, episode: Episode) -> Outcome:
    """Let the scripted expert try it, which sees where everything is: what a policy can hope for at most."""
    task, said = _begin(world, episode)
    expert = Expert(world, said, np.random.default_rng(episode.seed))
    watch = _Watch(world, task, said, episode)
    while not watch.over():
        world.command(expert.act())
        world.advance(1.0 / RATE)
        watch.look()
    return watch.outcome(1.0 / RATE)


def _begin(world: World, episode: Episode) -> tuple[Task, Task]:
    """Reset to the episode's scene: its task, and the one that is said."""
    task = world.reset(episode.seed, split=episode.split, kinds=episode.kinds)
    if not episode.wrong_instruction:
        return task, task
    assert world.scene is not None
    others = sorted(set(world.scene.cubes) - {task.colour})
    other = others[int(np.random.default_rng(episode.seed).integers(len(others)))]
    return task, with_colour(task, other)


class _Watch:
    """Looks at the world after each step: whether it is over, and how the arm moved."""

    def __init__(self, world: World, task: Task, said: Task, episode: Episode) -> None:
        self._world, self._task, self._said, self._limit = world, task, said, episode.time_limit
        self._joints = [world.joints()[0]]
        self.result = Outcome(episode.seed, task.kind, said.instruction)

    def look(self) -> None:
        self._joints.append(self._world.joints()[0])
        self.result.success = self.result.success or self._world.succeeded(self._task)
        self.result.obeyed = self.result.obeyed or self._world.succeeded(self._said)

    def over(self) -> bool:
        lost = self._world.failed(self._task) and self._world.failed(self._said)
        return self.result.success or self.result.obeyed or lost or self._world.time >= self._limit

    def outcome(self, period: float) -> Outcome:
        jerk = np.diff(np.array(self._joints), n=3, axis=0) / period**3
        self.result.squared_jerk = float(np.square(jerk).mean()) if jerk.size else 0.0
        self.result.seconds = self._world.time
        return self.result


class _PolicyRun:
    """Times are seconds of the simulation."""

    def __init__(self, world: World, policy: Predictor, contract: Contract, episode: Episode) -> None:
        self._world, self._policy, self._contract, self._episode = world, policy, contract, episode
        self._task, self._said = _begin(world, episode)
        self._watch = _Watch(world, self._task, self._said, episode)
        self._layout = ActionLayout(contract)
        self._order = command_order(contract)
        self._tick_period, self._frame_period = 1.0 / contract.control_rate, 1.0 / contract.policy_rate
        self._motion = Motion(contract, self._tick_period)
        self._motion.start(0.0)
        self._frame: Frame | None = None  # the newest that was not inferred yet
        self._frames = 0
        self._pending: tuple[float, Chunk] | None = None  # what is being inferred, and when it is done
        self._failed_until = 0.0

    def run(self) -> Outcome:
        tick = frame = 0
        now = 0.0
        while not self._watch.over():
            done = self._pending[0] if self._pending else math.inf
            until = min(tick * self._tick_period, frame * self._frame_period, done)
            self._world.advance(until - now)
            now = until
            if now == done:
                self._finish(now)
            if now == frame * self._frame_period:
                frame += 1
                self._observe(now)
            self._infer(now)
            if now == tick * self._tick_period:
                tick += 1
                self._tick(now)
        outcome = self._watch.outcome(self._tick_period)
        outcome.guard = Counter({kind: n for kind, n in self._motion.guard.counts.items() if n})
        return outcome

    def _observe(self, now: float) -> None:
        """The cameras deliver. Drawn only when inference comes to it before the next: drawing is what costs."""
        self._frames += 1
        busy_until = self._pending[0] if self._pending else self._failed_until
        if busy_until >= now + self._frame_period:
            return
        positions, velocities = self._world.joints()
        sample = JointSample(JOINTS, positions, velocities, None)
        state = np.concatenate([state_vector(source, sample) for source in self._contract.states])
        self._frame = Frame(self._world.images(), state, round(now * 1e9), now, self._frames)

    def _infer(self, now: float) -> None:
        frame = self._frame
        if frame is None or self._pending or now < self._failed_until:
            return
        if not self._motion.scheduler.wants(now):
            return
        self._frame = None
        outcome, scheduler = self._watch.result, self._motion.scheduler
        self._policy.seed(self._episode.seed * _NOISE_SEEDS + outcome.inferences)
        outcome.inferences += 1
        guidance = scheduler.guidance(frame.observed_at)
        rtc = Rtc(guidance.previous, guidance.delay, max(1, guidance.horizon)) if guidance else None
        scheduler.started(now)
        try:
            actions = self._policy.predict(frame.images, frame.state, self._said.instruction, rtc=rtc)
        except ObservationError:
            outcome.failures += 1
            self._failed_until = now + self._episode.latency
            return
        self._pending = (now + self._episode.latency, self._layout.chunk(actions, frame))
        if self._episode.latency == 0.0:
            self._finish(now)

    def _finish(self, now: float) -> None:
        assert self._pending is not None
        chunk = self._pending[1]
        self._pending = None
        self._motion.scheduler.delay.add(now - chunk.observed_at)
        self._motion.take(chunk, now)

    def _tick(self, now: float) -> None:
        motion, outcome = self._motion, self._watch.result
        if motion.unsent:
            sample = JointSample(JOINTS, *self._world.joints(), None)
            states = [state_vector(source, sample) for source in self._contract.states]
            motion.stand(measured_positions(self._contract, states))
        out = motion.tick(now, {}, self._frames)
        outcome.ticks += 1
        outcome.held_ticks += out.held and out.state.flag is Flag.NO_PLAN
        if out.values is not None:
            self._world.command(out.values[self._order])
        self._watch.look()


def command_order(contract: Contract) -> npt.NDArray[np.intp]:
    """Where in the contract's commands each joint of the arm is (6,). Raises ContractError where one is not."""
    names: list[str] = [joint for sink in contract.commands for joint in sink.joints]
    missing = [joint for joint in JOINTS if joint not in names]
    if missing or len(names) != len(JOINTS):
        raise ContractError(
            f"{contract.path}: command.joints: the simulated arm has {', '.join(JOINTS)}, got {', '.join(names)}"
        )
    return np.array([names.index(joint) for joint in JOINTS], np.intp)


def with_mode(contract: Contract, mode: str | None) -> Contract:
    """The contract with another scheduler mode; None keeps its own."""
    if mode is None:
        return contract
    return dataclasses.replace(contract, scheduler=dataclasses.replace(contract.scheduler, mode=mode))


def total(counters: Sequence[Counter[str]]) -> dict[str, Any]:
    """The sum of counters by kind, the most frequent first."""
    return dict(sum(counters, Counter()).most_common())
