"""The inference thread of vla_node: newest observation in, action chunk out, nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from .chunk import ActionLayout, Chunk
from .errors import ObservationError
from .frame import FrameBuffer
from .node_inputs import InstructionSlot
from .node_support import NodeClock, Reporter, describe
from .stats import Window

_RETRY = 0.5  # s to wait after the policy has raised, so that a broken one does not take the processor


class InferenceWorker:
    """Owns the policy from start to close. Only `enable`d does it infer; chunks wait in `chunks`."""

    def __init__(
        self,
        policy: Any,
        buffer: FrameBuffer,
        layout: ActionLayout,
        slot: InstructionSlot,
        *,
        clock: NodeClock,
        reporter: Reporter,
    ) -> None:
        self._policy = policy
        self._buffer = buffer
        self._layout = layout
        self._slot = slot
        self._clock = clock
        self._reporter = reporter
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._enabled = False
        # The control tick takes from the left; a few suffice, for it takes all at every tick.
        self.chunks: deque[Chunk] = deque(maxlen=8)
        self.stages = {name: Window() for name in ("decode", "predict", "observation to chunk")}
        self.last_error = ""
        self._thread = threading.Thread(target=self._run, name="vla_inference", daemon=True)
        self._thread.start()

    def enable(self) -> None:
        self._enabled = True
        self._wake.set()

    def disable(self) -> None:
        """Start no further inference. One that is running goes on; its chunk is refused by its age."""
        self._enabled = False
        self.chunks.clear()

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
        while not self._stopped.is_set():
            self._wake.wait(0.5)
            self._wake.clear()
            while self._enabled and not self._stopped.is_set() and self._infer():
                pass
        try:
            self._policy.close()
        except Exception as error:
            self._reporter.error("policy close", f"policy: closing failed: {describe(error)}")

    def _infer(self) -> bool:
        """One inference; False when there was nothing to infer."""
        counts = self._reporter.counts
        instruction = self._slot.text
        if not instruction:
            return False
        began = time.monotonic()
        try:
            frame = self._buffer.take(self._clock.now())
        except ObservationError as error:
            self._refused(error)
            return True
        if frame is None:
            return False
        decoded = time.monotonic()
        try:
            actions = self._policy.predict(frame.images, frame.state, instruction)
            chunk = self._layout.chunk(actions, frame)
        except ObservationError as error:
            self._refused(error)
            return True
        except Exception as error:
            counts.add("inferences_failed")
            self.last_error = describe(error)
            self._reporter.error(
                "inference", f"inference failed: {self.last_error}; holding at the chunk's end"
            )
            self._stopped.wait(_RETRY)
            return True
        self.last_error = ""
        self.stages["decode"].add(decoded - began)
        self.stages["predict"].add(time.monotonic() - decoded)
        self.stages["observation to chunk"].add(self._clock.now().steady - frame.observed_at)
        counts.add("inferences")
        if self._enabled:
            self.chunks.append(chunk)
        return True

    def _refused(self, error: ObservationError) -> None:
        self._reporter.counts.add("frames_rejected")
        self._reporter.warn("frame", f"{error}; observation ignored")
