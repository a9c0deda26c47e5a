"""`vla-infer doctor --topics`: the node's preflight, from a process of its own that listens for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor

from vla_infer.codecs import message_class
from vla_infer.contract import Contract
from vla_infer.doctor import Finding
from vla_infer.preflight import Source, findings, sources


def topic_findings(contract: Contract, *, seconds: float) -> Iterator[Finding]:
    """Listen for `seconds` and report on each topic of the contract and on its limits."""
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    node = rclpy.create_node("vla_infer_doctor", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    heard = sources(contract)
    try:
        for source in heard:
            _listen(node, source)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            executor.spin_once(timeout_sec=0.1)
        yield from findings(node, contract, heard, seconds=seconds)
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


def _listen(node: Any, source: Source) -> None:
    def arrived(message: Any) -> None:
        source.arrivals.append(time.monotonic())
        stamp = message.header.stamp
        source.ages.append(0.0 if source.receipt else time.time() - stamp.sec - stamp.nanosec * 1e-9)

    node.create_subscription(message_class(source.type), source.topic, arrived, source.qos)
