"""What has to be true before a robot is armed: topics there, of the type, QoS, rate and age, and limits given.

One line a finding. The node answers with it on `~/preflight`; `vla-infer doctor --topics` prints the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from .contract import Contract
from .doctor import FAIL, PASS, WARN, Finding
from .frame import MAX_AHEAD
from .limits import limit_arrays
from .node_inputs import input_qos
from .node_outputs import COMMAND_QOS

_FOREVER = 10**18  # ns; some middleware writes an infinite duration as a very long one


@dataclass
class Source:
    """A topic that feeds the policy, and what came on it: steady times of arrival and ages, in seconds."""

    topic: str
    type: str
    qos: QoSProfile
    receipt: bool  # its driver does not stamp
    arrivals: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)


def sources(contract: Contract) -> list[Source]:
    """The topics that feed the policy, nothing received yet."""
    kind = "sensor_msgs/msg/JointState"
    return [
        *(
            Source(c.topic, c.type, input_qos(reliable=c.reliable, depth=c.depth), c.receipt_stamp)
            for c in contract.cameras
        ),
        *(
            Source(s.topic, kind, input_qos(reliable=s.reliable, depth=10), s.receipt_stamp)
            for s in contract.states
        ),
    ]


def findings(node: Any, contract: Contract, heard: list[Source], *, seconds: float) -> Iterator[Finding]:
    """Every finding. heard: `sources` with what came on them in the last `seconds`."""
    names = dict(node.get_topic_names_and_types())
    for source in heard:
        yield _source(node, source, names, seconds=seconds, oldest=contract.max_observation_age)
    for sink in contract.commands:
        yield _sink(node, sink.topic, sink.type)
    yield limits_finding(contract)


def limits_finding(contract: Contract) -> Finding:
    """Whether every joint has a limit, and every position the limits that bound its motion."""
    limits = limit_arrays(contract, 1.0 / contract.control_rate)
    if limits.unlimited:
        mend = "give limits in the contract, or a urdf"
        return Finding(WARN, "limits", f"none at all for {', '.join(limits.unlimited)}", mend)
    loose = limits.loose
    if loose:
        return Finding(
            WARN, "limits", f"nothing bounds the speed of {', '.join(loose)}", "give velocity or step limits"
        )
    return Finding(PASS, "limits", f"given for all {limits.size} numbers of an action")


def _source(
    node: Any, source: Source, names: dict[str, list[str]], *, seconds: float, oldest: float
) -> Finding:
    """What came on a topic that feeds the policy."""
    topic = node.resolve_topic_name(source.topic)
    publishers = node.get_publishers_info_by_topic(topic)
    if not publishers:
        return Finding(
            FAIL, "topics", f"{topic}: nobody publishes", _mend_absence(node, topic, source, names)
        )
    wrong = sorted({p.topic_type for p in publishers} - {source.type})
    if wrong:
        found = f"{topic}: carries {', '.join(wrong)}, expected {source.type}"
        return Finding(FAIL, "topics", found, "set type in the contract")
    for publisher in publishers:
        misfit = qos_misfit(publisher.qos_profile, source.qos)
        if misfit:
            found = f"{topic}: QoS of {publisher.node_name} does not fit ({misfit})"
            return Finding(
                FAIL, "topics", found, "set qos: best_effort in the contract, or mend the publisher"
            )
    if not source.arrivals:
        mend = "check the driver's log, and the Fast DDS profile in the driver's shell"
        return Finding(FAIL, "topics", f"{topic}: a publisher, but no message in {seconds:g} s", mend)
    return _arrived(topic, source, [p.node_name for p in publishers], oldest)


def _arrived(topic: str, source: Source, publishers: list[str], oldest: float) -> Finding:
    """Rate and age of what came."""
    span = source.arrivals[-1] - source.arrivals[0]
    rate = (len(source.arrivals) - 1) / span if span > 0 else 0.0
    age = sorted(source.ages)[len(source.ages) // 2]
    text = f"{topic}: {rate:.1f} Hz, age {age * 1e3:.1f} ms"
    clocks = "the stamps are not this machine's time: synchronise clocks or set use_sim_time"
    if age < -MAX_AHEAD or age > max(0.5, oldest):
        return Finding(FAIL, "topics", text, clocks)
    if age > oldest:
        return Finding(
            FAIL, "topics", text, f"older than max_observation_age {oldest:g} s: hasten the driver"
        )
    if 0.0 < rate < 1.0 / oldest:
        mend = f"slower than max_observation_age {oldest:g} s allows: raise the rate or the age"
        return Finding(FAIL, "topics", text, mend)
    if len(publishers) > 1:
        found = f"{text}, {len(publishers)} publishers ({', '.join(publishers)})"
        return Finding(WARN, "topics", found, "keep one of them")
    if age < -0.005:
        return Finding(WARN, "topics", text, clocks)
    return Finding(PASS, "topics", text)


def _mend_absence(node: Any, topic: str, source: Source, names: dict[str, list[str]]) -> str:
    # Our own subscription makes the name known, so a name without publisher is no candidate.
    others = [
        name
        for name, types in names.items()
        if source.type in types and name != topic and node.count_publishers(name)
    ]
    near = difflib.get_close_matches(topic, others, 1, 0.0)
    if near:
        return f"start its driver, or set the topic in the contract; {near[0]} has that type"
    return "start its driver, and check ROS_DOMAIN_ID and the contract's topic"


def _sink(node: Any, topic: str, kind: str) -> Finding:
    """Who listens to, and who else publishes, a command topic."""
    name = node.resolve_topic_name(topic)
    listeners = node.get_subscriptions_info_by_topic(name)
    others = [p.node_name for p in node.get_publishers_info_by_topic(name) if p.node_name != node.get_name()]
    if not listeners:
        return Finding(WARN, "topics", f"{name}: nobody listens", "activate its controller before arming")
    wrong = sorted({s.topic_type for s in listeners} - {kind})
    if wrong:
        found = f"{name}: its listener takes {', '.join(wrong)}, the contract sends {kind}"
        return Finding(FAIL, "topics", found, "set type")
    for listener in listeners:
        misfit = qos_misfit(COMMAND_QOS, listener.qos_profile)
        if misfit:
            found = f"{name}: QoS of {listener.node_name} does not fit ({misfit})"
            return Finding(FAIL, "topics", found, "make its subscription volatile")
    text = f"{name}: heard by {', '.join(s.node_name for s in listeners)}"
    if others:
        return Finding(
            WARN, "topics", f"{text}; {', '.join(others)} publishes too", "stop all but one sender"
        )
    reliable = all(s.qos_profile.reliability != ReliabilityPolicy.BEST_EFFORT for s in listeners)
    return Finding(PASS, "topics", text if reliable else f"{text} (best effort)")


def qos_misfit(offered: QoSProfile, requested: QoSProfile) -> str:
    """Why a subscription would hear nothing of a publisher; empty when it would. DDS's own rules.

    rclpy's check takes a discovered "infinite" deadline for a demand, so it cannot be used on these.
    """
    reliability, durability = ReliabilityPolicy, DurabilityPolicy
    if offered.reliability == reliability.BEST_EFFORT and requested.reliability == reliability.RELIABLE:
        return "the publisher is best effort, the subscription reliable"
    if offered.durability == durability.VOLATILE and requested.durability == durability.TRANSIENT_LOCAL:
        return "the publisher is volatile, the subscription transient local"
    wanted, given = requested.deadline.nanoseconds, offered.deadline.nanoseconds
    if 0 < wanted < _FOREVER and not 0 < given <= wanted:
        return f"the subscription has a deadline of {wanted * 1e-9:g} s that the publisher does not offer"
    return ""
