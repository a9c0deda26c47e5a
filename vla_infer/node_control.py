"""The control side of vla_node: at every tick the scheduler's command goes out, whatever inference does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rclpy.duration import Duration
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from .chunk import ActionLayout, Chunk
from .codecs import COMMAND_CODECS, Setpoint, message_class
from .contract import DRY_SUFFIX, CommandSink
from .frame import FrameBuffer, Now, Readiness
from .node_inference import InferenceWorker
from .node_inputs import InstructionSlot
from .node_support import NodeClock, Reporter
from .scheduler import Command, Scheduler, Verdict
from .stats import TickClock, Window

_COMMAND_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)


@dataclass(frozen=True)
class Observing:
    """Where a control tick learns about observations and chunks."""

    buffer: FrameBuffer
    worker: InferenceWorker
    slot: InstructionSlot


class _Output:
    """One command topic: encodes the numbers of an action that are its own."""

    def __init__(self, node: Any, sink: CommandSink, part: slice, topic: str) -> None:
        self.publisher = node.create_lifecycle_publisher(message_class(sink.type), topic, _COMMAND_QOS)
        self._sink = sink
        self._part = part
        self._sent: Chunk | None = None

    def send(self, command: Command, now: Now, period: float) -> None:
        sink, chunk = self._sink, command.chunk
        values, times = command.values[None, self._part], np.array([period])
        if sink.whole_chunk and chunk is not None:
            if chunk is self._sent:
                return
            values = chunk.commands[command.row :, self._part]
            times = _times(chunk, command.row, now.steady)
        self._sent = chunk
        setpoint = Setpoint(sink.joints, sink.interface, values, times)
        self.publisher.publish(COMMAND_CODECS[sink.type].encode(setpoint, now.ros, sink.frame_id))


def _times(chunk: Chunk, row: int, now: float) -> npt.NDArray[np.float64]:
    """Seconds from now at which each row from `row` on is due, increasing; the first is due already."""
    due = np.array([chunk.due(i) - now for i in range(row, chunk.steps)])
    # Half the time to the next row, so that the times increase as a trajectory controller demands.
    due[0] = max((due[0] + chunk.period) / 2, 1e-3)
    return due


class Control:
    """The control timer, the scheduler and the publishers."""

    def __init__(
        self,
        node: Any,
        layout: ActionLayout,
        observing: Observing,
        *,
        rate: float,
        dry_run: bool,
        clock: NodeClock,
        reporter: Reporter,
    ) -> None:
        self._node = node
        self._observing = observing
        self._clock = clock
        self._reporter = reporter
        self.period = 1.0 / rate
        self.scheduler = Scheduler(zero_on_hold=layout.zero_on_hold)
        self.topics = [sink.topic + (DRY_SUFFIX if dry_run else "") for sink, _ in layout.parts]
        self._outputs = [
            _Output(node, sink, part, topic)
            for (sink, part), topic in zip(layout.parts, self.topics, strict=True)
        ]
        self._timer: Any = None
        self._state = ""
        self.ticks = TickClock(self.period)
        self.age = Window()  # s, of the observation behind each command at publication
        self.tick_time = Window()
        self.holding = ""  # why the last command was held, or nothing was sent

    def start(self) -> None:
        self.scheduler.reset(self._clock.now().steady)
        self.ticks = TickClock(self.period)
        self._state = ""
        self._timer = self._node.create_timer(
            self.period, self._reporter.guarded("control", self._tick), clock=self._clock.steady_clock
        )

    def stop(self) -> None:
        """No further tick; the last message is a hold. Does nothing when not started."""
        if self._timer is None:
            return
        self._node.destroy_timer(self._timer)
        self._timer = None
        self._reporter.guarded("control", self._send_hold)()

    def restart(self) -> None:
        """The clock was set: what was observed before it means nothing any more."""
        self.scheduler.reset(self._clock.now().steady)

    def destroy(self) -> None:
        self.stop()
        for output in self._outputs:
            self._node.destroy_lifecycle_publisher(output.publisher)
        self._outputs.clear()

    def _send_hold(self) -> None:
        now = self._clock.now()
        self.scheduler.hold(now.steady)
        command = self.scheduler.sample(now.steady)
        if command is not None:
            self._publish(command, now)
            for output in self._outputs:
                output.publisher.wait_for_all_acked(Duration(seconds=0.1))
        self.scheduler.reset(now.steady)

    def _tick(self) -> None:
        began = self._clock.steady()
        self.ticks.tick(began)
        now = self._clock.now()
        chunks = self._observing.worker.chunks
        while chunks:
            self._take(chunks.popleft(), now)
        readiness = self._observing.buffer.readiness(now)
        if not readiness.ready:
            self._reporter.counts.add(f"ticks_{readiness.kind}")
            self.scheduler.hold(now.steady)
        command = self.scheduler.sample(now.steady)
        if command is not None:
            self._publish(command, now)
            if command.chunk is not None:
                self.age.add(now.steady - command.chunk.observed_at)
        self._explain(command, readiness)
        self.tick_time.add(self._clock.steady() - began)

    def _take(self, chunk: Chunk, now: Now) -> None:
        verdict = self.scheduler.add(chunk, now.steady)
        if verdict is not Verdict.ACCEPTED:
            text = f"chunk refused: {verdict.value}"
            if verdict is Verdict.PAST:
                late = now.steady - chunk.end
                text += f" by {late:.3f} s; inference is slower than {chunk.steps} actions last"
            self._reporter.warn(f"chunk {verdict.name}", text)

    def _publish(self, command: Command, now: Now) -> None:
        for output in self._outputs:
            output.send(command, now, self.period)
        self._reporter.counts.add("commands_held" if command.held else "commands_played")

    def _explain(self, command: Command | None, readiness: Readiness) -> None:
        """Say, once for each change, why commands are held or none is sent."""
        if command is not None and not command.held:
            state, self.holding = "playing", ""
        else:
            state = "waiting" if command is None else "holding"
            if not readiness.ready:
                self.holding = readiness.reason
            elif not self._observing.slot.text:
                self.holding = "no instruction yet; publish one, or give a default"
            elif self._observing.worker.last_error:
                self.holding = f"inference fails: {self._observing.worker.last_error}"
            else:
                self.holding = (
                    "no chunk is due; inference is not done" if command else "the first chunk is computed"
                )
        change = state if state == "playing" else f"{state} {readiness.kind}"
        if change == self._state:
            return
        self._state = change
        if state == "playing":
            self._reporter.note(change, "commands follow the policy")
        else:
            self._reporter.warn(change, f"{state}: {self.holding}")
