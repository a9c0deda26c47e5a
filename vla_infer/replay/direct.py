"""Direct mode: the recording straight into the policy, without ROS, on a virtual clock.

Messages arrive at their recorded times, control ticks come exactly at theirs, and an inference takes as long
as it is measured to take; a frame that arrives meanwhile is dropped, as on the robot. What is left out is
transport, executor and timer, so the difference to `timeline` is theirs.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vla_infer.chunk import ActionLayout, Chunk
from vla_infer.contract import Contract
from vla_infer.contract_parse import one_line
from vla_infer.errors import ObservationError, ReplayError, VlaInferError
from vla_infer.failsafe import Flag
from vla_infer.frame import Frame, FrameBuffer, Now, Readiness
from vla_infer.motion import Motion, Outgoing, measured_positions
from vla_infer.rtc import Rtc

from .bag import Bag
from .observe import Feeder, Stamps, TopicMap
from .trace import Inference, Tick, Trace, observation_key, seed_of

NS = 1e-9
Images = Mapping[str, npt.NDArray[np.uint8]]


class Timed(Protocol):
    """Durations of the last call in seconds."""

    @property
    def preprocess(self) -> float: ...
    @property
    def engine(self) -> float: ...
    @property
    def postprocess(self) -> float: ...


class ReplayPolicy(Protocol):
    """The part of vla_infer.Policy that a replay uses."""

    @property
    def info(self) -> Any: ...
    @property
    def timing(self) -> Timed: ...
    def seed(self, value: int) -> None: ...
    def predict(
        self, images: Images, state: npt.NDArray[np.float32], task: str, *, rtc: Rtc | None = None
    ) -> npt.NDArray[np.float32]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class DirectOptions:
    """every_frame: infer every observation, time standing still meanwhile, without control ticks.

    frames: called with every observation and its inference, for the report's
    pictures; progress: called with bag time and duration in seconds; clock and
    cpu_clock measure the inferences.
    """

    every_frame: bool = False
    instruction: str = ""
    control_rate: float = 0.0
    max_seconds: float = 0.0
    frames: Callable[[Frame, Inference], None] | None = None
    progress: Callable[[float, float], None] | None = None
    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.process_time


class _Run:
    """One replay. Times are seconds of bag time."""

    def __init__(
        self, policy: ReplayPolicy, contract: Contract, bag: Bag, topics: TopicMap, options: DirectOptions
    ) -> None:
        self._policy = policy
        self._options = options
        self._contract = contract
        self._bag = bag
        self._topics = topics
        # Stamps of zero are refused, so a bag that starts at zero is moved.
        self._epoch = max(bag.start, 1_000_000_000)
        self._buffer = FrameBuffer(contract)
        self._layout = ActionLayout(contract)
        self.feeder = Feeder(contract, topics, self._buffer, instruction=options.instruction)
        rate = options.control_rate or contract.control_rate
        self.trace = Trace("direct", rate, contract.policy_rate)
        self.trace.sent = {topic: [] for topic in topics.cameras}
        self._period = 1.0 / rate
        self._motion = Motion(contract, self._period)
        self._motion.start(0.0)
        self._ticks = 0
        self._busy_until: float | None = None
        self._ready: list[tuple[float, int, Chunk]] = []  # chunks and when the control tick may have them
        self._order = count()

    def run(self) -> Trace:
        stamps = Stamps(self._bag, self._topics)
        end = self._bag.duration * NS
        if self._options.max_seconds:
            end = min(end, self._options.max_seconds)
        # Read in this thread: time stands still meanwhile, and no other thread disturbs what is measured.
        for message in self._bag.messages(self._topics.inputs):
            now = message.time * NS
            if now > end:
                break
            self._advance(now)
            if message.topic in self.trace.sent:
                self.trace.sent[message.topic].append(now)
            self.feeder.feed(message.topic, stamps.moved(message, self._epoch), self._now(now))
            self._infer(now)
            if self._options.progress is not None:
                self._options.progress(now, end)
        self._advance(end)
        self.trace.duration = end
        self.trace.rejected, self.trace.reordered = self.feeder.rejected, +self.feeder.reordered
        self.trace.guard = Counter(self._motion.guard.counts)
        return self.trace

    def _now(self, seconds: float) -> Now:
        return Now(seconds, self._epoch + round(seconds * 1e9))

    def _advance(self, until: float) -> None:
        """Everything that is due up to `until`: ends of inferences and control ticks, in order."""
        while True:
            tick = self._ticks * self._period if not self._options.every_frame else np.inf
            done = self._busy_until if self._busy_until is not None else np.inf
            if min(tick, done) > until:
                return
            if done <= tick:
                self._busy_until = None
                self._infer(done)
            else:
                self._tick(tick)
                self._ticks += 1

    def _infer(self, now: float) -> None:
        if self._busy_until is not None or not self.feeder.instruction:
            return
        if not self._options.every_frame and not self._motion.scheduler.wants(now):
            return
        clock = self._options.clock
        began = clock()
        try:
            frame = self._buffer.take(self._now(now))
            if frame is None:
                return
            decoded = clock()
            key = observation_key(frame.images, frame.state, self.feeder.instruction)
            self._policy.seed(seed_of(key))
            options = self._guidance(frame)
            start, spent = clock(), self._options.cpu_clock()
            actions = self._policy.predict(frame.images, frame.state, self.feeder.instruction, **options)
            spent = self._options.cpu_clock() - spent
            took = (decoded - began) + (clock() - start)
            chunk = self._layout.chunk(actions, frame, generation=self.feeder.generation)
        except ObservationError as error:
            self.trace.failures.append((now, str(error)))
            return
        except VlaInferError:
            raise
        except Exception as error:
            raise ReplayError(f"inference failed: {type(error).__name__}: {one_line(error)}") from error
        timing = self._policy.timing
        record = Inference(
            sequence=frame.sequence,
            key=key,
            stamp=(frame.stamp - self._epoch) * NS,
            bag_time=(frame.stamp - self._epoch) * NS,
            taken=now,
            ready=now + took,
            decode=decoded - began,
            preprocess=timing.preprocess,
            engine=timing.engine,
            postprocess=timing.postprocess,
            actions=np.array(actions, np.float32),
            cpu=spent,
        )
        self.trace.inferences.append(record)
        if self._options.frames is not None:
            self._options.frames(frame, record)
        if not self._options.every_frame:
            self._motion.scheduler.started(now)
            self._busy_until = now + took
            heapq.heappush(self._ready, (now + took, next(self._order), chunk))

    def _guidance(self, frame: Frame) -> dict[str, Rtc]:
        """What the chunk is to continue, in the contract's scheduler mode rtc."""
        guidance = None
        if not self._options.every_frame:
            guidance = self._motion.scheduler.guidance(frame.observed_at)
        if guidance is None:
            return {}
        return {"rtc": Rtc(guidance.previous, guidance.delay, max(1, guidance.horizon))}

    def _tick(self, now: float) -> None:
        """The node's control tick: take what is ready, then what scheduler, guard and failsafe decide."""
        motion = self._motion
        motion.scheduler.instruct(self.feeder.generation)
        while self._ready and self._ready[0][0] <= now:
            ready, _, chunk = heapq.heappop(self._ready)
            motion.scheduler.delay.add(ready - chunk.observed_at)
            motion.failsafe.inferred()
            verdict, _ = motion.take(chunk, now)
            self.trace.verdicts[verdict.name.lower() if verdict else "refused_by_guard"] += 1
        readiness = self._buffer.readiness(self._now(now))
        raised = {} if readiness.ready else {Flag.OBSERVATION: readiness.reason}
        if motion.unsent and readiness.ready:
            motion.stand(measured_positions(self._contract, self._buffer.states()))
        out = motion.tick(now, raised, self._buffer.arrivals)
        self.trace.ticks.append(tick_record(now, None, out, readiness))


def tick_record(now: float, error: float | None, out: Outgoing, readiness: Readiness) -> Tick:
    """A control tick as a record. now: s; error: s that it was late, where that means something."""
    chunk = out.chunk
    return Tick(
        time=now,
        error=error,
        values=None if out.values is None else np.array(out.values, np.float64),
        chunk=chunk.sequence if chunk is not None else None,
        row=out.row,
        age=now - chunk.observed_at if chunk is not None else None,
        held=out.held,
        reason=_reason(out, readiness) if out.held else "",
    )


def _reason(out: Outgoing, readiness: Readiness) -> str:
    flag = out.state.flag
    if out.values is None and flag in (None, Flag.NO_PLAN, Flag.OBSERVATION):
        return "waiting"
    if flag is Flag.OBSERVATION:
        return "recovering" if readiness.ready else readiness.kind
    if flag is None or flag is Flag.NO_PLAN:
        return "starved"
    return str(flag.value)


def replay_direct(
    policy: ReplayPolicy, contract: Contract, bag: Bag, topics: TopicMap, options: DirectOptions
) -> Trace:
    """Run a bag through a policy. Raises ReplayError when not one observation could be made of it."""
    run = _Run(policy, contract, bag, topics, options)
    trace = run.run()
    if not trace.inferences:
        raise ReplayError(f"{bag.path}: no observation could be made: {_why(run, trace)}")
    return trace


def _why(run: _Run, trace: Trace) -> str:
    if not run.feeder.instruction:
        return "no instruction in the bag nor in the contract; give one with --instruction"
    if run.feeder.last_error:
        return run.feeder.last_error
    if trace.failures:
        return trace.failures[-1][1]
    return run._buffer.readiness(run._now(trace.duration)).reason
