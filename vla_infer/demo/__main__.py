"""The demonstration: the node in one process, a bag's player in another, over Fast DDS.

python -m vla_infer.demo --policy DIRECTORY --bag FOLDER
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_infer.contract import Contract, load_contract
from vla_infer.demo.figures import Diagnostics, live_line, table, ticks
from vla_infer.errors import VlaInferError

START_LIMIT = 60.0  # s until the first command
STOP_LIMIT = 5.0  # s for a process to end


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--policy", type=Path, required=True, help="policy directory as LeRobot saves it")
    parser.add_argument("--contract", default="so101", help="contract of the robot (default: so101)")
    parser.add_argument("--bag", type=Path, required=True, help="folder of a rosbag2 recording")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds from the first command")
    parser.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="of inference (default: one processor is left for messages and the control timer)",
    )
    parser.add_argument("--profile", type=Path, help="Fast DDS profile (XML) for both processes")
    parser.add_argument(
        "--domain", type=int, help="ROS domain (default: one of its own, apart from any robot)"
    )
    parser.add_argument("--log", type=Path, default=Path("demo.log"), help="file for what the node prints")
    args = parser.parse_args(argv)
    if not args.duration > 0:
        parser.error(f"--duration is {args.duration:g}: expected seconds above 0")
    try:
        contract = load_contract(args.contract)
    except VlaInferError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    # The bag's cameras must never reach a real node, nor its commands a real robot. This process listens there too.
    domain = 1 + os.getpid() % 100 if args.domain is None else args.domain
    os.environ |= {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    environment = dict(os.environ)
    if args.profile is not None:
        environment["RMW_IMPLEMENTATION"] = "rmw_fastrtps_cpp"
        for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
            environment[name] = str(args.profile.resolve())
    policy = ["-p", f"policy:={args.policy.resolve()}", "-p", f"contract:={args.contract}"]
    policy += ["-p", f"threads:={args.threads}", "-p", "dry_run:=true"]
    commands = {
        "node": [sys.executable, "-m", "vla_infer.node", "--ros-args", *policy],
        "player": [sys.executable, "-m", "vla_infer.demo.player", str(args.bag), "--wait", "10"],
    }
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("wb") as log:
        processes = {
            name: subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            for name, command in commands.items()
        }
        try:
            problem = _watch(contract, processes, args.duration)
        except KeyboardInterrupt:
            problem = "stopped"
        finally:
            ends = {name: _stop(process) for name, process in processes.items()}
    for name, (status, seconds) in ends.items():
        print(f"  {name + ' ended':<22}  {seconds:.2f} s after SIGINT, exit status {status}")
        if status and not problem:
            problem = f"the {name} ended with status {status}"
    if problem:
        print(f"demo: {problem}; the end of {args.log}:", file=sys.stderr)
        lines = args.log.read_text(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-8:]), file=sys.stderr)
        return 1
    return 0


class _Listener:
    """Keeps the publication stamps of the commands and the newest diagnostics of the node."""

    def __init__(self, node: Any, contract: Contract) -> None:
        from diagnostic_msgs.msg import DiagnosticArray

        from vla_infer.demo.player import message_class

        self.stamps: list[int] = []  # ns, by the publisher's DDS writer
        self.diagnostics: Diagnostics = {}
        sink = contract.commands[0]
        node.create_subscription(message_class(sink.type), f"{sink.topic}_dry", self._on_command, 100)
        node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_command(self, _: Any, info: dict[str, Any]) -> None:
        self.stamps.append(info["source_timestamp"])

    def _on_diagnostics(self, message: Any) -> None:
        self.diagnostics = {
            status.name.rpartition(": ")[2]: {item.key: item.value for item in status.values}
            for status in message.status
        }


def _watch(contract: Contract, processes: dict[str, subprocess.Popen[bytes]], duration: float) -> str:
    """Show the live line for `duration` and then the table. Returns what went wrong, or nothing."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor

    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    ros = rclpy.create_node("demo_view", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(ros)
    listener = _Listener(ros, contract)
    shown = _Line()
    begun = time.monotonic()
    first: float | None = None
    try:
        while first is None or time.monotonic() < first + duration:
            executor.spin_once(timeout_sec=0.05)
            for name, process in processes.items():
                if process.poll() is not None:
                    return f"the {name} ended with status {process.returncode} before its time"
            now = time.monotonic()
            if first is None:
                if listener.stamps:
                    first, listener.stamps = now, listener.stamps[-1:]
                elif now > begun + START_LIMIT:
                    return f"no command in the first {START_LIMIT:g} s"
                else:
                    shown.show(f"waiting for the node {now - begun:4.0f} s")
                    continue
            recent = ticks(listener.stamps[-int(2 * contract.control_rate) :], contract.control_rate)
            shown.show(live_line(now - first, duration, recent, listener.diagnostics))
    finally:
        shown.end()
        ros.destroy_node()
        rclpy.shutdown(context=context)
    print(
        "\n".join(
            table(ticks(listener.stamps, contract.control_rate), contract.control_rate, listener.diagnostics)
        )
    )
    if len(listener.stamps) < duration * contract.control_rate / 2:
        return f"{len(listener.stamps)} commands in {duration:g} s: less than half of {contract.control_rate:g} Hz"
    return ""


class _Line:
    """A line that is written over itself on a terminal, and now and then again elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = -1e9

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now < self._last + (0.2 if self._terminal else 2.0):
            return
        self._last = now
        if self._terminal:
            width = os.get_terminal_size().columns
            print(f"\r{text[: width - 1]:<{width - 1}}", end="", flush=True)
        else:
            print(text, flush=True)

    def end(self) -> None:
        if self._terminal:
            print()


def _stop(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """End a process by SIGINT, then by force. Returns its exit status and the seconds it took."""
    begun = time.monotonic()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        status = process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    return status, time.monotonic() - begun


if __name__ == "__main__":
    sys.exit(main())
