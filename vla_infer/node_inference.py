"""The inference thread of vla_node: newest observation in, action chunk out, nobody waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .chunk import ActionLayout, Chunk
from .delay import InferenceWatchdog
from .errors import DeviceLostError, ObservationError
from .frame import Frame, FrameBuffer
from .node_inputs import InstructionSlot
from .node_support import Reporter, describe
from .rtc import Rtc
from .scheduler import Scheduler
from .stats import Window
from .time_slice import ask_for_usual_slice

_RETRY = 0.5  # s to wait after the policy has raised, so that a broken one does not take the processor


@dataclass(frozen=True)
class Inferring:
    """What an inference is made from, and who says when it is wanted."""

    buffer: FrameBuffer
    layout: ActionLayout
    slot: InstructionSlot
    scheduler: Scheduler
    watchdog: InferenceWatchdog


@dataclass(frozen=True)
class Outcome:
    """How an inference ended: its chunk, or why there is none. lost: no further try can succeed."""

    chunk: Chunk | None
    problem: str = ""
    lost: bool = False


class Inference:
    """One inference after the other: `step`, from one thread; what came of them waits in `outcomes`.

    pause(seconds): waits after a failure.
    """

    def __init__(
        self, policy: Any, source: Inferring, *, reporter: Reporter, pause: Callable[[float], object]
    ) -> None:
        self._policy = policy
        self._source = source
        self._clock = reporter.clock
        self._reporter = reporter
        self._pause = pause
        self._enabled = False
        # The control tick takes from the left; a few suffice, for it takes all at every tick.
        self.outcomes: deque[Outcome] = deque(maxlen=8)
        self.stages = {name: Window() for name in ("decode", "predict", "observation to chunk")}
        self.last_error = ""
        self._began: float | None = None  # s, steady clock: since when the policy has been busy

    @property
    def policy_info(self) -> Any:
        """What the policy is now (`PolicyInfo`): its precision may change, see `first_observations`."""
        return self._policy.info

    def enable(self) -> None:
        self._enabled = True
        self.wake()

    def disable(self) -> None:
        """Start no further inference. One that is running goes on; its chunk is refused by its age."""
        self._enabled = False
        self.outcomes.clear()

    def wake(self) -> None:
        """An observation or an instruction arrived."""

    def hangs(self) -> str:
        """Why the inference under way counts as hanging; empty while it does not."""
        began, limit = self._began, self._source.watchdog.limit
        if began is None or self._clock.steady() - began <= limit:
            return ""
        return f"an inference has not returned for {limit:.1f} s"

    def close_policy(self) -> None:
        try:
            self._policy.close()
        except Exception as error:
            self._reporter.error("policy close", f"policy: closing failed: {describe(error)}")

    def step(self) -> bool:
        """One inference; False when there was nothing to infer."""
        source = self._source
        instruction, generation = source.slot.current
        now = self._clock.now()
        if not instruction or not source.slot.running or not source.scheduler.wants(now.steady):
            return False
        began = self._clock.steady()
        try:
            frame = source.buffer.take(now)
        except ObservationError as error:
            self._refused(error)
            return True
        if frame is None:
            return False
        decode = self._clock.steady() - began
        self.stages["decode"].add(decode)
        source.scheduler.started(now.steady)
        try:
            chunk = self._predict(frame, instruction, generation)
        except ObservationError as error:
            self._refused(error)
            return True
        except Exception as error:
            self._failed(error)
            return True
        self.last_error = ""
        ready = self._clock.now()
        delay = ready.steady - frame.observed_at
        self.stages["observation to chunk"].add(delay)
        source.scheduler.delay.add(delay)
        self._reporter.counts.add("inferences")
        if self._enabled:
            self.outcomes.append(Outcome(chunk))
        if self._reporter.observer is not None:
            self._reporter.observer.inferred(frame, chunk, now, ready, decode)
        return True

    def _predict(self, frame: Frame, instruction: str, generation: int) -> Chunk:
        guidance = self._source.scheduler.guidance(frame.observed_at)
        options: dict[str, Any] = {}
        if guidance is not None:
            options["rtc"] = Rtc(guidance.previous, guidance.delay, max(1, guidance.horizon))
        began = self._began = self._clock.steady()
        try:
            actions = self._policy.predict(frame.images, frame.state, instruction, **options)
        finally:
            self._began = None
        seconds = self._clock.steady() - began
        self._source.watchdog.add(seconds)
        self.stages["predict"].add(seconds)
        return self._source.layout.chunk(actions, frame, generation=generation)

    def _failed(self, error: Exception) -> None:
        self._reporter.counts.add("inferences_failed")
        self.last_error = describe(error)
        self._reporter.error("inference", f"inference failed: {self.last_error}; holding")
        if self._enabled:
            self.outcomes.append(Outcome(None, self.last_error, lost=isinstance(error, DeviceLostError)))
        self._pause(_RETRY)

    def _refused(self, error: ObservationError) -> None:
        self._reporter.counts.add("frames_rejected")
        self._reporter.warn("frame", f"{error}; observation ignored")


class InferenceWorker(Inference):
    """The inference thread. Owns the policy from start to close; infers only while it is enabled."""

    def __init__(self, policy: Any, source: Inferring, *, reporter: Reporter) -> None:
        self._wake = threading.Event()
        self._stopped = threading.Event()
        super().__init__(policy, source, reporter=reporter, pause=self._stopped.wait)
        self._thread = threading.Thread(target=self._run, name="vla_inference", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout: float) -> bool:
        """End the thread and close the policy; False if an inference outlasts `timeout` seconds.

        The thread then ends and closes the policy by itself, as soon as the inference returns.
        """
        self._enabled = False
        self._stopped.set()
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        ask_for_usual_slice()  # not the control thread's, which starts this one
        while not self._stopped.is_set():
            self._wake.wait(0.5)
            self._wake.clear()
            while self._enabled and not self._stopped.is_set() and self.step():
                pass
        self.close_policy()
