"""Replay over ROS 2: the node as it is, in a process, and figures that can be recounted from what was recorded."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")
pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
pytest.importorskip("vla_infer._engine", reason="needs the built engine")

from golden import ROOT
from replay_support import write_bag
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from vla_infer import replay
from vla_infer.contract import load_contract
from vla_infer.errors import ReplayError
from vla_infer.replay import report
from vla_infer.replay.bag import Bag
from vla_infer.replay.live import own_domain, pair
from vla_infer.replay.observe import map_topics
from vla_infer.replay.player import at_rate, timeline
from vla_infer.replay.sweep import bisect

DEADLINE = 15.0  # ms: some commands are older and some are not


@pytest.fixture(scope="module")
def bag_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bag(tmp_path_factory.mktemp("bags") / "bag", seconds=2.0)


def command(bag: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    replay.add_arguments(parser)
    fixed = [str(bag), "--policy", str(ROOT / "smolvla"), "--contract", "so101", "--threads", "1", "--quiet"]
    return replay.main(parser.parse_args([*fixed, *words]))


@pytest.fixture(scope="module")
def timed(bag_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run in timeline mode: its report and its output bag."""
    folder = tmp_path_factory.mktemp("timeline")
    words = ["--mode", "timeline", "--deadline", str(DEADLINE), "--json", str(folder / "a.json")]
    words += ["--html", str(folder / "a.html"), "--record", str(folder / "out"), "--warmup", "0"]
    assert command(bag_path, *words) == 0
    assert "data:image/jpeg;base64," in (folder / "a.html").read_text()
    return report.read(folder / "a.json"), folder / "out"


def recorded(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """Topic -> (ns at the recorder, message) of an output bag."""
    store = get_typestore(Stores.ROS2_JAZZY)
    found: dict[str, list[tuple[int, Any]]] = {}
    with Reader(path) as reader:
        for connection, when, data in reader.messages():
            found.setdefault(connection.topic, []).append(
                (when, store.deserialize_cdr(data, connection.msgtype))
            )
    return found


def ns(header: Any) -> int:
    return int(header.stamp.sec) * 10**9 + int(header.stamp.nanosec)


def test_figures_can_be_recounted_from_the_output_bag(timed: tuple[dict[str, Any], Path]) -> None:
    """Ages and misses from nothing but the bag: when each command arrived, and of when its observation was."""
    document, path = timed
    topics = recorded(path)
    commands = topics["/forward_position_controller/commands_dry"]
    sources = topics["/replay/command"]
    assert 0 <= len(commands) - len(sources) <= 1  # the node's last hold has no tick
    images = [
        sorted(when for when, _ in topics[f"/replay/sent/{name}/image_raw"]) for name in ("top", "wrist")
    ]
    period = np.median(np.diff(max(images, key=len)))
    start, end = min(times[0] for times in images), max(times[-1] for times in images) + period
    # The run is from the first image to a period after the last; a tick is of the time at which it decided.
    pairs = [
        (arrived, source)
        for (arrived, _), (decided, source) in zip(commands, sources, strict=False)
        if start <= decided < end
    ]
    ages = np.array([(at - ns(source)) * 1e-6 for at, source in pairs if source.frame_id != "held"])
    latency, control = document["latency_ms"]["capture_to_command"], document["control"]
    assert len(ages) == latency["count"] == control["commands_played"] > 50
    assert latency["mean"] == pytest.approx(ages.mean(), abs=1e-3)
    assert latency["p99"] == pytest.approx(np.percentile(ages, 99), abs=1e-3)
    assert latency["max"] == pytest.approx(ages.max(), abs=1e-3)
    assert control["deadline_misses"] == (ages > DEADLINE).sum() > 0
    assert control["commands_held"] == sum(source.frame_id == "held" for _, source in pairs)
    sent = topics["/replay/sent/top/image_raw"]
    assert len(sent) == 60 == document["ros2_benchmark"]["NUM_FRAMES_SENT"]
    chunks = topics["/replay/chunk"]
    assert len(chunks) == document["frames"]["inferences"]
    stamps = {
        ns(header) for topic in ("top", "wrist") for _, header in topics[f"/replay/sent/{topic}/image_raw"]
    }
    assert all(ns(header) in stamps for _, header in chunks)  # every observation is an image that was sent
    ready = {header.frame_id: when for when, header in chunks}
    for (arrived, _), (_, source) in zip(commands, sources, strict=False):
        assert source.frame_id == "held" or ready[source.frame_id] < arrived


def test_timeline_report_is_whole(timed: tuple[dict[str, Any], Path]) -> None:
    document, _ = timed
    assert document["mode"] == "timeline"
    for name in ("transport", "engine", "tick_error", "capture_to_first_command"):
        assert document["latency_ms"][name]["count"] > 20, name
    assert document["latency_ms"]["transport"]["min"] > 0
    assert document["cold_start"]["first_command_s"] > document["cold_start"]["load_s"] > 0
    assert document["extra"]["buffer_waits"] == 0
    assert document["resources"]["memory_mb_max"] > 50
    assert document["agreement"]["source"] == "commands"


def test_live_and_direct_see_and_do_the_same(
    timed: tuple[dict[str, Any], Path], bag_path: Path, tmp_path: Path
) -> None:
    """Observations that both made are equal to the bit, and so are the actions."""
    path = tmp_path / "direct.json"
    assert command(bag_path, "--every-frame", "--json", str(path)) == 0
    live, direct = report.load_actions(timed[0]), report.load_actions(report.read(path))
    common = live.keys() & direct.keys()
    assert len(common) >= 0.8 * len(live)
    for key in common:
        np.testing.assert_array_equal(live[key], direct[key])


def test_loop_and_sweep(bag_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "loop.json"
    assert command(bag_path, "--mode", "loop", "--rate", "20", "--seconds", "3", "--json", str(path)) == 0
    document = report.read(path)  # longer than the bag: it came round
    assert document["ros2_benchmark"]["NUM_FRAMES_SENT"] == pytest.approx(61, abs=1)
    assert document["ros2_benchmark"]["MEAN_PLAYBACK_FRAME_RATE"] == pytest.approx(20, rel=0.05)
    path = tmp_path / "sweep.json"
    assert command(bag_path, "--mode", "sweep", "--seconds", "0.3", "--json", str(path)) == 0
    extra = report.read(path)["extra"]
    found = extra["highest_rate_hz"]
    for trial in extra["trials"]:
        if found is not None and trial["rate_hz"] == found:
            assert trial["dropped_share"] < 0.05
        if found is not None and found < trial["rate_hz"] <= 1.05 * found:
            assert trial["dropped_share"] >= 0.05


def test_node_that_cannot_start_is_one_line(bag_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"vla_node: .*no-such-policy") as caught:
        command(bag_path, "--policy", "no-such-policy", "--mode", "timeline")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- parts
def test_replay_keeps_away_from_this_shells_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    for domain in range(102):
        monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
        assert own_domain() != domain


def test_commands_are_paired_with_ticks() -> None:
    ticks = np.array([0, 20, 40, 60], np.int64)
    sent = np.array([False, True, True, True])
    every = np.array([41, 42, 61], np.int64)  # the first came late, after the second was sent
    np.testing.assert_array_equal(pair(ticks, sent, every), [0, 41, 42, 61])
    np.testing.assert_array_equal(pair(ticks, sent, np.append(every, 99)), [0, 41, 42, 61])
    lost = np.array([21, 61], np.int64)
    np.testing.assert_array_equal(pair(ticks, sent, lost), [0, 21, 0, 61])


@pytest.mark.parametrize("limit", [1.0, 3.0, 33.0, 119.0, 500.0])
def test_sweep_finds_the_limit(limit: float) -> None:
    found, tried = bisect(lambda rate: 0.0 if rate <= limit else 0.5)
    if limit < 2.0:
        assert found is None
    else:
        assert found is not None
        assert found <= limit
        assert found >= min(limit, 120.0) / 1.1
    assert len(tried) < 12


@pytest.mark.parametrize("rate", [3.0, 30.0, 100.0])
def test_fixed_rate(bag_path: Path, rate: float) -> None:
    bag = Bag(bag_path)
    topics = map_topics(bag, load_contract("so101"), {})
    rows = [(due, message.topic) for due, message in at_rate(bag, topics, rate=rate, seconds=4.5)]
    times = np.array([due for due, _ in rows])
    assert (np.diff(times) >= 0).all()
    for topic in topics.cameras:
        np.testing.assert_allclose(np.diff([due for due, name in rows if name == topic]), 1 / rate, rtol=2e-2)
    states = np.diff([due for due, name in rows if name == "/joint_states"])
    assert states.max() < 0.035  # recorded at 50 Hz: never much staler than that


def test_timeline_is_as_recorded(bag_path: Path) -> None:
    bag = Bag(bag_path)
    topics = map_topics(bag, load_contract("so101"), {})
    rows = list(timeline(bag.messages(topics.inputs), seconds=1.0))
    assert all(due == message.time * 1e-9 <= 1.0 for due, message in rows)
    assert 30 <= sum(message.topic == "/top/image_raw" for _, message in rows) <= 31


def test_memory_is_bounded_by_the_buffer(tmp_path: Path) -> None:
    """A bag of 200 MB through a buffer of 8 MB: the reader's own memory grows by little more than that."""
    path = write_bag(tmp_path / "large", seconds=4.0, size=(640, 480), commands=False)
    assert Bag(path).size > 190e6
    code = (
        "import resource, sys\n"
        "from vla_infer.replay.bag import Bag, Preload\n"
        "bag = Bag(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
        "before = peak()\n"
        "buffered = Preload(bag.messages(list(bag.topics)), lambda m: len(m.data), limit=8 << 20)\n"
        "count = sum(1 for _ in buffered)\n"
        "assert count == bag.count, count\n"
        "print(peak() - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert float(done.stdout) < 40.0  # MB: the buffer, a chunk of the file or two, and the one in hand
