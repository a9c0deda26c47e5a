"""The command publishers of vla_node: from the numbers of an action to the messages of the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from .chunk import Chunk
from .codecs import COMMAND_CODECS, Setpoint, message_class
from .contract import CommandSink
from .frame import Now
from .motion import TRAJECTORY_END, Outgoing

Preview = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

COMMAND_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.VOLATILE,
)
# A trajectory is sent anew when half of it is over, so that the motion goes on while messages come.
_RENEW = TRAJECTORY_END / 2


class Output:
    """One command topic: encodes the numbers of an action that are its own."""

    def __init__(self, node: Any, sink: CommandSink, part: slice, topic: str) -> None:
        self.publisher = node.create_lifecycle_publisher(message_class(sink.type), topic, COMMAND_QOS)
        self._sink = sink
        self._part = part
        self._sent: Chunk | None = None
        self._renewed_at = -np.inf

    def send(
        self, values: npt.NDArray[np.float64], now: Now, period: float, preview: Callable[[], Preview] | None
    ) -> None:
        """Publish `values` (A,), due one period ahead; with `preview`, what follows them too."""
        sink = self._sink
        rows, times = values[None, self._part], np.array([min(period, TRAJECTORY_END)])
        if preview is not None:
            ahead, times = preview()
            rows = ahead[:, self._part]
        setpoint = Setpoint(sink.joints, sink.interface, rows, times)
        self.publisher.publish(COMMAND_CODECS[sink.type].encode(setpoint, now.ros, sink.frame_id))

    def due(self, outgoing: Outgoing, now: Now) -> bool:
        """Whether this tick needs a message: always, but for a trajectory that still has enough ahead."""
        if not self._sink.whole_chunk or outgoing.held:
            self._sent = None
            return True
        old = not 0.0 <= now.steady - self._renewed_at < _RENEW - 1e-6
        if outgoing.chunk is self._sent and not old:
            return False
        self._sent, self._renewed_at = outgoing.chunk, now.steady
        return True

    @property
    def ahead(self) -> bool:
        """Whether it sends what follows, not the next command alone."""
        return self._sink.whole_chunk
