"""The modes over ROS 2: the node in a process of its own, the recording published to it, its commands received.

Player and node talk in a ROS domain of their own, on this machine only, and the node runs dry: a replay reaches
no robot.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.contract import Contract
from vla_infer.contract_parse import config_directories
from vla_infer.errors import ReplayError
from vla_infer.heap import keep_heap

from .bag import Bag, BagMessage, Preload
from .observe import Stamps, TopicMap
from .resources import Sampler
from .trace import Inference, Tick, Trace

NS = 1e-9
_SETTLE = 0.5  # s for which the node goes on after the last message
_PROFILES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


@dataclass(frozen=True)
class LiveOptions:
    """parameters: of vla_node, by name. rate: of the camera with most images in loop mode, Hz; buffer: bytes
    read ahead; record: folder of an output bag; progress: called with seconds done and in all."""

    mode: str
    parameters: dict[str, Any]
    domain: int
    rate: float = 30.0
    seconds: float = 0.0
    buffer: int = 256 << 20
    record: Path | None = None
    progress: Callable[[float, float], None] | None = None


@dataclass(frozen=True)
class LiveResult:
    """trace of the run (of the highest rate that held, in sweep mode); info: the policy's PolicyInfo."""

    trace: Trace
    resources: dict[str, float | None]
    info: Any
    extra: dict[str, Any]


def own_domain() -> int:
    """A ROS domain other than the one of this shell."""
    mine = int(os.environ.get("ROS_DOMAIN_ID") or 0)
    domain = 1 + os.getpid() % 100
    return domain if domain != mine else domain + 1


@contextmanager
def local_ros() -> Iterator[None]:
    """ROS of this process on this machine only, with room for images in shared memory, as long as it lasts."""
    wanted = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
    profile = next((d / "fastdds.xml" for d in config_directories() if (d / "fastdds.xml").is_file()), None)
    if profile is not None and not any(os.environ.get(name) for name in _PROFILES):
        wanted |= dict.fromkeys(_PROFILES, str(profile))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class NodeProcess:
    """vla_node, watched, as a process. Its output goes to a file, of which the end is shown when it fails."""

    def __init__(self, parameters: dict[str, Any], *, domain: int, folder: Path) -> None:
        self._trace = folder / "trace.npz"
        self._log = (folder / "node.log").open("w+")
        words = [sys.executable, "-m", "vla_infer.replay.node_process", str(self._trace), "--ros-args"]
        for name, value in parameters.items():
            words += ["-p", f"{name}:={json.dumps(value)}"]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            words, stdout=self._log, stderr=subprocess.STDOUT, env=environment, stdin=subprocess.DEVNULL
        )

    def check(self) -> None:
        """Raise ReplayError when the node has ended."""
        status = self.process.poll()
        if status is not None:
            raise ReplayError(f"vla_node ended with status {status}: {self._last_words()}")

    def complaint(self) -> str:
        """The node's last line of error, empty when there is none."""
        self._log.flush()
        text = Path(self._log.name).read_text(errors="replace")
        lines = [line for line in text.splitlines() if "[ERROR]" in line]
        return lines[-1].split("]: ", 1)[-1] if lines else ""

    def _last_words(self) -> str:
        text = Path(self._log.name).read_text(errors="replace").strip()
        return self.complaint() or (text.splitlines()[-1] if text else "it said nothing")

    def stop(self) -> dict[str, Any]:
        """End the node; what it watched, as arrays by name."""
        self.check()
        self.process.send_signal(signal.SIGINT)
        try:
            status = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired as error:
            raise ReplayError("vla_node did not end within 30 s of SIGINT; it was killed") from error
        if not self._trace.is_file():
            raise ReplayError(f"vla_node left no trace (status {status}): {self._last_words()}")
        with np.load(self._trace, allow_pickle=False) as arrays:
            return dict(arrays)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


def replay_live(contract: Contract, bag: Bag, topics: TopicMap, options: LiveOptions) -> LiveResult:
    """Run a bag through the node. Raises ReplayError when it does not start or makes nothing of the bag."""
    keep_heap()
    with local_ros(), tempfile.TemporaryDirectory(prefix="vla_replay_") as folder:
        from .player import Player  # needs ROS

        began = time.monotonic()
        node = NodeProcess(options.parameters, domain=options.domain, folder=Path(folder))
        player = Player(contract, topics, Stamps(bag, topics), domain=options.domain)
        sampler = Sampler(node.process.pid, device=str(options.parameters["device"]))
        try:
            _wait(player.matched, node)
            start_up = time.monotonic() - began
            sampler.start()
            extra = _play(player, bag, topics, options, node)
            time.sleep(_SETTLE)
            sampler.stop()
            arrays = node.stop()
        finally:
            sampler.stop()
            node.kill()
            player.close()
        return _result(arrays, _Heard(player, contract, topics), options, sampler, (start_up, extra))


def _wait(condition: Callable[[], bool], node: NodeProcess, *, timeout: float = 600.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        node.check()
        problem = node.complaint()
        if problem:
            raise ReplayError(f"vla_node: {problem}")
        if time.monotonic() > end:
            raise ReplayError(f"vla_node was not ready within {timeout:g} s; is the policy that large?")
        time.sleep(0.02)


Item = tuple[float, BagMessage]


def _play(player: Any, bag: Bag, topics: TopicMap, options: LiveOptions, node: NodeProcess) -> dict[str, Any]:
    from .player import at_rate, timeline

    if options.mode == "sweep":
        from .sweep import sweep

        return sweep(player, bag, topics, options, node)
    length = bag.duration * NS
    if options.mode == "timeline":
        total = min(options.seconds or length, length)
        source = timeline(bag.messages(topics.inputs), seconds=options.seconds)
    else:
        total = options.seconds or length
        source = at_rate(bag, topics, rate=options.rate, seconds=total)
    late = player.late
    waits = play_buffered(player, source, options, node, total)
    extra: dict[str, Any] = {"published": player.count, "published_late": player.late - late}
    extra["buffer_waits"] = waits
    return extra | ({"rate_hz": options.rate} if options.mode == "loop" else {})


def play_buffered(
    player: Any, source: Iterator[Item], options: LiveOptions, node: NodeProcess, total: float
) -> int:
    """Publish `source`, read ahead into a buffer that is full before the first message; the count of
    messages that had to be waited for."""
    buffered = Preload(source, lambda item: len(item[1].data), limit=options.buffer)

    def alive(done: float) -> None:
        node.check()
        if options.progress is not None:
            options.progress(done, total)

    try:
        buffered.fill()
        player.play(buffered, alive)
    finally:
        buffered.close()
    return buffered.waits


class _Heard:
    """What the player knows of a run when it is over."""

    def __init__(self, player: Any, contract: Contract, topics: TopicMap) -> None:
        self.commands: list[tuple[int, str, bytes]] = list(player.commands)
        self.sent = dict(player.sent)
        self.contract = contract
        self.cameras = {camera.topic: topic for topic, camera in topics.cameras.items()}
        by_stamp = sorted(
            (stamp, bag_stamp)
            for sent in self.sent.values()
            for stamp, bag_stamp in zip(sent.stamps, sent.bag_stamps, strict=True)
        )
        self._stamps = np.array([stamp for stamp, _ in by_stamp], np.int64)
        self._bag_stamps = np.array([stamp for _, stamp in by_stamp], np.int64)

    def bag_time(self, stamp: int) -> float:
        """Seconds since the bag's start of the image sent with `stamp`, or of the last before it."""
        at = int(np.searchsorted(self._stamps, stamp, side="right")) - 1
        return float(self._bag_stamps[max(0, at)]) * NS


def _result(
    arrays: dict[str, Any],
    heard: _Heard,
    options: LiveOptions,
    sampler: Sampler,
    run: tuple[float, dict[str, Any]],
) -> LiveResult:
    start_up, extra = run
    meta = json.loads(str(arrays["meta"]))
    if not len(arrays["keys"]):
        raise ReplayError(
            "vla_node made no observation of the bag; "
            f"{meta['counts']} (see `--mode direct`, which says what was refused)"
        )
    first = min(times.times[0] for times in heard.sent.values() if times.times)
    trace = make_trace(arrays, meta, heard, options, first)
    window = extra.pop("window", None)
    if window is not None:
        begun, ended = ((edge - first) * NS for edge in window)
        inside = [t for times in trace.sent.values() for t in times if begun <= t < ended]
        trace = cut(trace, min(inside), max(inside))
        trace.duration += _period(trace)
    if heard.commands:
        trace.cold_start = start_up + (heard.commands[0][0] - first) * NS
    commands = sum(tick.values is not None for tick in trace.ticks)
    resources = sampler.figures(inferences=len(arrays["keys"]), commands=max(1, commands))
    if options.record is not None:
        from .output_bag import write_output

        write_output(options.record, arrays, heard.sent, heard.commands, heard.contract)
    extra["commands_received"] = len(heard.commands)
    return LiveResult(trace, resources, SimpleNamespace(**meta["info"]), extra)


def pair(
    tick_times: npt.NDArray[np.int64], sent: npt.NDArray[np.bool_], received: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """For each tick the time at which its command was received (ns), 0 where nothing was sent or received.

    tick_times: (T,) ns; sent: (T,); received: (R,) ns, in order. Where as many were received as sent they
    belong together in order; the node's last hold, when it ends, is one more and no tick's. Else some were
    lost, and a command belongs to the last tick before it.
    """
    result = np.zeros(len(tick_times), np.int64)
    where = np.flatnonzero(sent)
    if len(received) - len(where) in (0, 1):
        result[where] = received[: len(where)]
        return result
    for when in received:
        at = int(np.searchsorted(tick_times[where], when, side="right")) - 1
        if at >= 0 and not result[where[at]]:
            result[where[at]] = when
    return result


def make_trace(
    arrays: dict[str, Any], meta: dict[str, Any], heard: _Heard, options: LiveOptions, first: int
) -> Trace:
    """The trace of a live run; times count from `first` (ns), when the first image was sent."""
    contract = heard.contract
    rate = float(options.parameters.get("control_rate") or contract.control_rate)
    trace = Trace(options.mode, rate, contract.policy_rate, load=float(meta["load"]))
    trace.sent = {topic: [(t - first) * NS for t in sent.times] for topic, sent in heard.sent.items()}
    stamps: dict[int, int] = {}
    for row, (stamp, taken), key, actions in zip(
        arrays["inferences"], arrays["stamps"], arrays["keys"], arrays["actions"], strict=True
    ):
        sequence, _, _, took, decode, preprocess, engine, postprocess = (float(v) for v in row)
        stamps[int(sequence)] = int(stamp)
        begun = (int(taken) - first) * NS
        trace.inferences.append(
            Inference(
                int(sequence),
                str(key),
                (int(stamp) - first) * NS,
                heard.bag_time(int(stamp)),
                begun,
                begun + took,
                decode,
                preprocess,
                engine,
                postprocess,
                actions,
            )
        )
    received = np.array(
        [when for when, topic, _ in heard.commands if topic == heard.commands[0][1]], np.int64
    )
    sent = np.isfinite(arrays["values"]).any(axis=1)
    receipts = pair(arrays["tick_times"], sent, received)
    rows = zip(
        arrays["ticks"],
        arrays["tick_times"],
        arrays["values"],
        arrays["reasons"],
        sent,
        receipts,
        strict=True,
    )
    for row, when, values, reason, is_sent, receipt in rows:
        _, lateness, chunk, index, age, held = (float(v) for v in row)
        stamp = stamps.get(int(chunk))
        at_receipt = (int(receipt) - stamp) * NS if receipt and stamp is not None else age
        trace.ticks.append(
            Tick(
                (int(when) - first) * NS,
                lateness,
                values if is_sent else None,
                int(chunk) if chunk >= 0 else None,
                int(index),
                at_receipt if chunk >= 0 else None,
                held=bool(held),
                reason=str(reason),
            )
        )
    _count(trace, arrays, meta, heard)
    # Before the first image and after the last one's period there is nothing to act on.
    trace.duration = max(times[-1] for times in trace.sent.values() if times) + _period(trace)
    trace.ticks = [tick for tick in trace.ticks if 0 <= tick.time < trace.duration]
    return trace


def _period(trace: Trace) -> float:
    """The usual time (s) between two images of the camera that sends most."""
    most = max(trace.sent.values(), key=len)
    return float(np.median(np.diff(most))) if len(most) > 1 else 0.0


def _count(trace: Trace, arrays: dict[str, Any], meta: dict[str, Any], heard: _Heard) -> None:
    trace.verdicts, trace.guard = Counter(meta["verdicts"]), Counter(meta["guard"])
    for name, number in meta["counts"].items():
        if name.startswith("rejected "):
            trace.rejected[name.removeprefix("rejected ")] = number
    for number in range(meta["counts"].get("inferences_failed", 0)):
        trace.failures.append((trace.inferences[-1].ready, f"failed inference {number + 1}"))
    for topic, (stamp, when) in zip(arrays["received_topics"], arrays["received"], strict=True):
        sent = heard.sent.get(heard.cameras.get(str(topic), ""))
        if sent is None or not sent.stamps:
            continue
        at = int(np.searchsorted(sent.stamps, stamp))
        if at < len(sent.stamps) and sent.stamps[at] == stamp:
            trace.transport.append((int(when) - sent.times[at]) * NS)
    newest: dict[str, int] = {}
    for topic, (stamp, _) in zip(arrays["received_topics"], arrays["received"], strict=True):
        trace.reordered[str(topic)] += int(stamp) < newest.get(str(topic), int(stamp))
        newest[str(topic)] = max(int(stamp), newest.get(str(topic), int(stamp)))
    trace.reordered = +trace.reordered


def cut(trace: Trace, start: float, end: float) -> Trace:
    """The part of a run from `start` to `end` (s), with times from its beginning; counts stay the whole run's."""
    from dataclasses import replace

    def inside(time: float) -> bool:
        return start <= time <= end

    return replace(
        trace,
        sent={topic: [t - start for t in times if inside(t)] for topic, times in trace.sent.items()},
        inferences=[
            replace(one, stamp=one.stamp - start, taken=one.taken - start, ready=one.ready - start)
            for one in trace.inferences
            if inside(one.stamp)
        ],
        ticks=[replace(tick, time=tick.time - start) for tick in trace.ticks if inside(tick.time)],
        failures=[(when - start, text) for when, text in trace.failures if inside(when)],
        duration=end - start,
    )
