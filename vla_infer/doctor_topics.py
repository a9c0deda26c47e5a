"""`vla-infer doctor --topics`: do the contract's topics carry what the node expects, and does anyone listen?"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy

from vla_infer.contract import Contract
from vla_infer.doctor import FAIL, PASS, WARN, Finding


@dataclass
class _Source:
    """A topic that feeds the policy, and what came on it: steady times of arrival and ages, in seconds."""

    topic: str
    type: str
    reliable: bool
    arrivals: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)


def topic_findings(contract: Contract, *, seconds: float) -> Iterator[Finding]:
    """Listen for `seconds` and report on each topic of the contract."""
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    node = rclpy.create_node("vla_infer_doctor", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    sources = [_Source(c.topic, c.type, c.reliable) for c in contract.cameras]
    sources += [_Source(s.topic, "sensor_msgs/msg/JointState", s.reliable) for s in contract.states]
    try:
        for source in sources:
            _listen(node, source)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            executor.spin_once(timeout_sec=0.1)
        names = dict(node.get_topic_names_and_types())
        for source in sources:
            yield _source_finding(node, source, names, seconds)
        for sink in contract.commands:
            yield _sink_finding(node, sink.topic, sink.type)
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def _listen(node: Any, source: _Source) -> None:
    def arrived(message: Any) -> None:
        source.arrivals.append(time.monotonic())
        stamp = message.header.stamp
        source.ages.append(time.time() - stamp.sec - stamp.nanosec * 1e-9)

    package, _, name = source.type.split("/")
    kind = getattr(import_module(f"{package}.msg"), name)
    reliability = ReliabilityPolicy.RELIABLE if source.reliable else ReliabilityPolicy.BEST_EFFORT
    node.create_subscription(kind, source.topic, arrived, QoSProfile(depth=10, reliability=reliability))


def _source_finding(node: Any, source: _Source, names: dict[str, list[str]], seconds: float) -> Finding:
    """What came on a topic that feeds the policy."""
    topic = node.resolve_topic_name(source.topic)
    publishers = node.get_publishers_info_by_topic(topic)
    if not publishers:
        # Our own subscription makes the name known, so a name without publisher is no candidate.
        others = [
            name
            for name, types in names.items()
            if source.type in types and name != topic and node.count_publishers(name)
        ]
        near = difflib.get_close_matches(topic, others, 1, 0.0)
        mend = (
            f"start its driver, or set the topic in the contract; {near[0]} has that type"
            if near
            else ("start its driver, and check ROS_DOMAIN_ID and the contract's topic")
        )
        return Finding(FAIL, "topics", f"{topic}: nobody publishes", mend)
    wrong = sorted({p.topic_type for p in publishers} - {source.type})
    if wrong:
        return Finding(
            FAIL,
            "topics",
            f"{topic}: carries {', '.join(wrong)}, expected {source.type}",
            "set type in the contract",
        )
    if not source.arrivals:
        best_effort = any(p.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT for p in publishers)
        if source.reliable and best_effort:
            mend = "its publisher is best effort: set reliable: false in the contract"
        else:
            mend = "check the driver's log, and the Fast DDS profile in the driver's shell"
        return Finding(FAIL, "topics", f"{topic}: a publisher, but no message in {seconds:g} s", mend)
    span = source.arrivals[-1] - source.arrivals[0]
    rate = (len(source.arrivals) - 1) / span if span > 0 else 0.0
    age = sorted(source.ages)[len(source.ages) // 2]
    text = f"{topic}: {rate:.1f} Hz, age {age * 1e3:.1f} ms"
    if len(publishers) > 1:
        nodes = ", ".join(p.node_name for p in publishers)
        return Finding(WARN, "topics", f"{text}, {len(publishers)} publishers ({nodes})", "keep one of them")
    if not -0.005 < age < 0.5:
        return Finding(
            WARN,
            "topics",
            text,
            "the stamps are not this machine's time: synchronise clocks or set use_sim_time",
        )
    return Finding(PASS, "topics", text)


def _sink_finding(node: Any, topic: str, kind: str) -> Finding:
    """Who listens to, and who else publishes, a command topic."""
    name = node.resolve_topic_name(topic)
    listeners = node.get_subscriptions_info_by_topic(name)
    others = [p.node_name for p in node.get_publishers_info_by_topic(name)]
    if not listeners:
        return Finding(WARN, "topics", f"{name}: nobody listens", "activate its controller before arming")
    wrong = sorted({s.topic_type for s in listeners} - {kind})
    if wrong:
        return Finding(
            FAIL,
            "topics",
            f"{name}: its listener takes {', '.join(wrong)}, the contract sends {kind}",
            "set type",
        )
    text = f"{name}: heard by {', '.join(s.node_name for s in listeners)}"
    if others:
        return Finding(
            WARN, "topics", f"{text}; {', '.join(others)} publishes too", "stop all but one sender"
        )
    return Finding(PASS, "topics", text)
