"""The emergency stop and the run switch of vla_node: what an operator has in hand, whatever state it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import Bool
from std_srvs.srv import SetBool, Trigger

from .contract import Contract
from .doctor import FAIL, Finding
from .frame import FrameBuffer
from .node_inputs import InstructionSlot
from .node_support import Reporter
from .preflight import findings, sources

_RECENT = 2.0  # s


class EmergencyStop:
    """Latched from the topic `emergency_stop` (std_msgs/Bool, true) or the service `~/emergency_stop`, and
    reset by the service `~/reset_emergency_stop` alone. It outlasts every lifecycle transition.
    """

    def __init__(self, node: Any, reporter: Reporter) -> None:
        self.reason = ""  # why it is latched; empty when it is not
        self._reporter = reporter
        # Two subscriptions, for a best-effort one alone may lose the message and a reliable one alone does
        # not hear a best-effort publisher. Latching twice is latching once.
        for reliability in (ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT):
            node.create_subscription(
                Bool,
                "emergency_stop",
                reporter.guarded("emergency_stop", self._on_message),
                QoSProfile(depth=10, reliability=reliability),
            )
        node.create_service(Trigger, "~/emergency_stop", self._on_stop)
        node.create_service(Trigger, "~/reset_emergency_stop", self._on_reset)

    @property
    def latched(self) -> bool:
        return bool(self.reason)

    def latch(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            self._reporter.counts.add("emergency_stops")
            self._reporter.error(f"emergency stop {self._reporter.counts['emergency_stops']}", reason)

    def _on_message(self, message: Any) -> None:
        # False means a released button; it takes a reset to go on.
        if message.data:
            self.latch("emergency stop by topic; release it and call ~/reset_emergency_stop")

    def _on_stop(self, request: Any, response: Any) -> Any:
        self.latch("emergency stop by service; call ~/reset_emergency_stop")
        response.success, response.message = True, self.reason
        return response

    def _on_reset(self, request: Any, response: Any) -> Any:
        response.success = self.latched
        response.message = (
            "reset; activate the node to move again" if self.latched else "no emergency stop is latched"
        )
        if self.latched:
            self.reason = ""
            self._reporter.info("emergency stop: reset by an operator")
        return response


class RunSwitch:
    """The service `~/run` (std_srvs/SetBool): false holds, true goes on with the instruction in force.

    `active` gives the instruction slot of an active node, None otherwise.
    """

    def __init__(self, node: Any, reporter: Reporter, active: Callable[[], InstructionSlot | None]) -> None:
        self._reporter = reporter
        self._active = active
        node.create_service(SetBool, "~/run", self._on_run)

    def _on_run(self, request: Any, response: Any) -> Any:
        slot = self._active()
        if slot is None:
            response.success, response.message = False, "the node is not active; activate it first"
        elif request.data and not slot.text:
            response.success, response.message = False, "no instruction; publish one or set the parameter"
        else:
            slot.running = bool(request.data)
            response.success = True
            response.message = f"running: '{slot.text}'" if slot.running else "stopped: holding"
            self._reporter.info(f"~/run: {response.message}")
        return response


class Preflight:
    """The service `~/preflight` (std_srvs/Trigger): one line a finding, success when none is a FAIL.

    `configured` gives contract and observations of a configured node, None otherwise.
    """

    def __init__(
        self, node: Any, reporter: Reporter, configured: Callable[[], tuple[Contract, FrameBuffer] | None]
    ) -> None:
        self._node = node
        self._reporter = reporter
        self._configured = configured
        node.create_service(Trigger, "~/preflight", self._on_request)

    def findings(self) -> list[Finding]:
        """Empty when nothing is configured."""
        configured = self._configured()
        if configured is None:
            return []
        contract, buffer = configured
        now = self._reporter.clock.now()
        heard = sources(contract)
        for source, (arrivals, ages) in zip(heard, buffer.recent(now), strict=True):
            # What came long ago says that nothing comes now.
            fresh = [index for index, at in enumerate(arrivals) if now.steady - at < _RECENT]
            source.arrivals = [arrivals[index] for index in fresh]
            source.ages = [ages[index] for index in fresh]
        return list(findings(self._node, contract, heard, seconds=_RECENT))

    def _on_request(self, request: Any, response: Any) -> Any:
        found = self.findings()
        response.success = bool(found) and all(finding.level != FAIL for finding in found)
        response.message = "\n".join(map(str, found)) or "the node is not configured; configure it first"
        return response
