"""The control side of vla_node: at every tick the command that `Motion` decides goes out, whatever inference does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from rclpy.duration import Duration

from .chunk import ActionLayout
from .contract import DRY_SUFFIX
from .control_timer import ControlTimer
from .failsafe import Flag, Level, State
from .frame import FrameBuffer, Now, Readiness
from .motion import Motion, Outgoing, measured_positions
from .node_inference import InferenceWorker, Outcome
from .node_inputs import InstructionSlot
from .node_outputs import Output
from .node_safety import EmergencyStop
from .node_support import Reporter
from .scheduler import Verdict
from .stats import TickClock, Window


@dataclass(frozen=True)
class Observing:
    """Where a control tick learns about observations, chunks and the operator.

    stop(level, reason): called once when the failsafe asks to deactivate or to exit and the robot stands.
    """

    buffer: FrameBuffer
    worker: InferenceWorker
    slot: InstructionSlot
    emergency: EmergencyStop
    stop: Callable[[Level, str], None]


class Control:
    """The control timer and the publishers; what is sent is `motion`'s decision."""

    def __init__(
        self,
        node: Any,
        layout: ActionLayout,
        motion: Motion,
        observing: Observing,
        *,
        dry_run: bool,
        reporter: Reporter,
    ) -> None:
        self._node = node
        self.motion = motion
        self._observing = observing
        self._clock = reporter.clock
        self._reporter = reporter
        self.period = motion.period
        self.topics = [sink.topic + (DRY_SUFFIX if dry_run else "") for sink, _ in layout.parts]
        self._outputs = [
            Output(node, sink, part, topic)
            for (sink, part), topic in zip(layout.parts, self.topics, strict=True)
        ]
        self._timer: ControlTimer | None = None
        self._state = ""
        self._stopping = False  # the node was asked to deactivate or to exit
        self._jumped = ""  # why the clock is not to be trusted this tick
        self.ticks = TickClock(self.period)
        self.age = Window()  # s, of the observation behind each command at publication
        self.tick_time = Window()
        self.holding = ""  # why the last command was held, or nothing was sent
        self.level = Level.RUN

    def start(self) -> None:
        self.motion.start(self._clock.now().steady)
        self.ticks = TickClock(self.period)
        self._state, self._stopping, self._jumped = "", False, ""
        tick = self._reporter.guarded("control", self._tick)
        self._timer = ControlTimer(self._node, self.period, tick, clock=self._clock)

    def turn(self) -> None:
        """The tick, if it is due: to be called between any two callbacks of the executor."""
        if self._timer is not None:
            self._timer.turn()

    def stop(self) -> None:
        """No further tick; the last message is a hold. Does nothing when not started."""
        if self._timer is None:
            return
        self._timer.destroy()
        self._timer = None
        self._reporter.guarded("control", self._send_hold)()

    def jump(self, reason: str) -> None:
        """The clock was set: what was observed before it means nothing any more."""
        self._jumped = reason
        self.motion.scheduler.reset(self._clock.now().steady)

    def destroy(self) -> None:
        self.stop()
        for output in self._outputs:
            self._node.destroy_lifecycle_publisher(output.publisher)
        self._outputs.clear()

    def _send_hold(self) -> None:
        now = self._clock.now()
        values = self.motion.still(now.steady)
        if values is None:
            return
        for output in self._outputs:
            output.send(values, now, self.period, None)
        self._reporter.counts.add("commands_held")
        for output in self._outputs:
            output.publisher.wait_for_all_acked(Duration(seconds=0.1))

    def _tick(self) -> None:
        began = self._clock.steady()
        lateness = self.ticks.tick(began)
        now = self._clock.now()
        observing, motion = self._observing, self.motion
        motion.scheduler.instruct(observing.slot.current[1])
        outcomes = observing.worker.outcomes
        while outcomes:
            self._take(outcomes.popleft(), now)
        readiness = observing.buffer.readiness(now)
        raised = self._raised(readiness)
        if motion.unsent and readiness.ready:
            motion.stand(measured_positions(motion.contract, observing.buffer.states()))
        out = motion.tick(now.steady, raised, observing.buffer.arrivals)
        self._publish(out, now)
        self._explain(out, readiness)
        if out.state.level >= Level.DEACTIVATE and motion.at_rest and not self._stopping:
            self._stopping = True
            observing.stop(out.state.level, out.state.reason)
        if self._reporter.observer is not None:
            self._reporter.observer.ticked(now, lateness, out, readiness)
        self.tick_time.add(self._clock.steady() - began)

    def _raised(self, readiness: Readiness) -> dict[Flag, str]:
        observing, failsafe = self._observing, self.motion.failsafe
        raised = {}
        if not readiness.ready:
            self._reporter.counts.add(f"ticks_{readiness.kind}")
            raised[Flag.OBSERVATION] = readiness.reason
        if self._jumped:
            raised[Flag.CLOCK], self._jumped = self._jumped, ""
        if not observing.slot.running:
            raised[Flag.STOPPED] = "stopped by ~/run; call it with true to go on"
        if observing.emergency.latched:
            failsafe.latch(Flag.EMERGENCY_STOP, observing.emergency.reason)
        else:
            failsafe.reset()
        hangs = observing.worker.hangs()
        if hangs:
            failsafe.latch(Flag.INFERENCE_HANGS, hangs)
        return raised

    def _take(self, outcome: Outcome, now: Now) -> None:
        chunk = outcome.chunk
        if chunk is None:
            self.motion.failsafe.engine_failed(outcome.problem, lost=outcome.lost)
            return
        self.motion.failsafe.inferred()
        verdict, reason = self.motion.take(chunk, now.steady)
        if verdict is Verdict.ACCEPTED:
            return
        if verdict is Verdict.PAST:
            late = now.steady - chunk.end
            reason += f" by {late:.3f} s; inference is slower than {chunk.steps} actions last"
        self._reporter.warn(f"chunk {verdict.name if verdict else 'guard'}", f"chunk refused: {reason}")

    def _publish(self, out: Outgoing, now: Now) -> None:
        values = out.values
        if values is None:
            return

        @cache
        def preview() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
            return self.motion.preview(now.steady, values)

        for output in self._outputs:
            if output.due(out, now):
                output.send(values, now, self.period, preview if output.ahead and not out.held else None)
        self._reporter.counts.add("commands_held" if out.held else "commands_played")
        if out.chunk is not None:
            self.age.add(now.steady - out.chunk.observed_at)

    def _explain(self, out: Outgoing, readiness: Readiness) -> None:
        """Say, once for each change, why commands are held or none is sent."""
        self.level = out.state.level
        if not out.held:
            change, self.holding = "playing", ""
        else:
            self.holding = self._why(out.state, nothing=out.values is None)
            flag = out.state.flag.name if out.state.flag else ""
            change = f"{'waiting' if out.values is None else 'holding'} {flag} {readiness.kind}"
        if change == self._state:
            return
        self._state = change
        if not out.held:
            self._reporter.note(change, "commands follow the policy")
        elif out.state.level >= Level.DEACTIVATE:
            self._reporter.error(change, f"{out.state.level.name}: {self.holding}")
        else:
            self._reporter.warn(change, f"{change.split()[0]}: {self.holding}")

    def _why(self, state: State, *, nothing: bool) -> str:
        if state.flag is Flag.ENGINE:
            return f"inference fails: {state.reason}"
        if state.flag is not Flag.NO_PLAN:
            return state.reason
        if not self._observing.slot.text:
            return "no instruction yet; publish one, or give a default"
        return "the first chunk is computed" if nothing else "no chunk is due; inference is not done"
