"""The scene, its recording and the player."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")

from vla_infer.demo import scene
from vla_infer.demo.bag import TOPICS, write_bag
from vla_infer.tools import make_bag

PERIOD = scene.PERIOD


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bags") / "short"
    write_bag(path, seconds=0.5, width=160, height=120)
    return path


def tool_from_joints(joints: tuple[float, ...]) -> tuple[float, float, float]:
    """Forward kinematics, written apart from the scene's inverse."""
    pan, lift, flex, wrist, _, _ = joints
    upper = lift  # angle of each part from straight up
    lower = upper + math.pi / 2 + flex
    tool = lower + wrist
    reach = scene.UPPER * math.sin(upper) + scene.LOWER * math.sin(lower) + scene.TOOL * math.sin(tool)
    height = scene.SHOULDER_HEIGHT + scene.UPPER * math.cos(upper) + scene.LOWER * math.cos(lower)
    return reach * math.cos(pan), reach * math.sin(pan), height + scene.TOOL * math.cos(tool)


@pytest.mark.parametrize("t", np.linspace(0, PERIOD, 23))
def test_joints_reach_the_tool(t: float) -> None:
    pose = scene.pose_at(t)
    assert tool_from_joints(pose.joints) == pytest.approx(pose.tool, abs=1e-6)


def test_motion_is_smooth_and_loops() -> None:
    times = np.arange(0, 2 * PERIOD, 0.01)
    joints = np.array([scene.pose_at(t).joints for t in times])
    cube = np.array([scene.pose_at(t).cube for t in times])
    assert np.abs(np.diff(joints, axis=0)).max() < 0.04  # rad in 10 ms
    assert np.abs(np.diff(cube, axis=0)).max() < 0.008  # m in 10 ms: carried, never thrown
    assert np.ptp(joints, axis=0)[0] > 0.5
    assert cube[:, 2].max() > 0.05


def test_cube_moves_in_both_pictures() -> None:
    for render in (scene.render_top, scene.render_wrist):
        a, b = (
            np.argwhere((render(t)[..., 0] > 190) & (render(t)[..., 1] < 60)).mean(axis=0) for t in (0, 4.6)
        )
        assert np.linalg.norm(a - b) > 30  # pixels


def test_whole_bag_is_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_bag.main([str(tmp_path / "bag")]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "bag").iterdir())
    assert size < 5_000_000
    assert "8 s, two cameras 640x480" in capsys.readouterr().out


def test_make_bag_refuses_an_existing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_bag.main([str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bag_holds_what_was_rendered(bag: Path) -> None:
    from rosbags.highlevel import AnyReader

    with AnyReader([bag]) as reader:
        assert {c.topic: c.msgtype for c in reader.connections} == TOPICS
        counts: dict[str, int] = {}
        for connection, stamp, data in reader.messages():
            counts[connection.topic] = counts.get(connection.topic, 0) + 1
            message = reader.deserialize(data, connection.msgtype)
            if connection.topic == "/wrist/image_raw":
                seconds = (stamp - reader.start_time) / 1e9
                image = message.data.reshape(message.height, message.width, 3)
                np.testing.assert_array_equal(image, scene.render_wrist(seconds, 160, 120))
    assert counts == {"/top/image_raw": 15, "/wrist/image_raw": 15, "/joint_states": 50, "/instruction": 1}


class TestPlayer:
    @pytest.fixture(autouse=True)
    def _ros(self) -> None:
        pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")

    def test_stamp_replaces_the_recorded_one_only(self, bag: Path) -> None:
        from rclpy.serialization import deserialize_message

        from vla_infer.demo.player import message_class, read_bag

        recording = read_bag(bag)
        message = next(m for m in recording.messages if m.topic == "/joint_states" and m.time > 0)
        kind = message_class(TOPICS["/joint_states"])
        before = deserialize_message(message.data, kind)
        after = deserialize_message(message.with_stamp(5_000_000_007), kind)
        assert (after.header.stamp.sec, after.header.stamp.nanosec) == (5, 7)
        after.header.stamp = before.header.stamp
        assert after == before
        instruction = next(m for m in recording.messages if m.topic == "/instruction")
        assert instruction.with_stamp(1) == instruction.data

    def test_loop_leaves_no_gap(self, bag: Path) -> None:
        from vla_infer.demo.player import read_bag

        assert read_bag(bag).length == pytest.approx(0.5e9, rel=0.01)

    @pytest.mark.parametrize("content", [None, b"", b"rosbag2_bagfile_information:\n  version: 9\n"])
    def test_what_is_no_bag_gives_one_line(
        self, content: bytes | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        from vla_infer.demo import player

        path = tmp_path / "bag"
        if content is not None:
            path.mkdir()
            (path / "metadata.yaml").write_bytes(content)
        assert player.main([str(path)]) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert str(path) in error

    def test_plays_over_dds_with_fresh_stamps_and_loops(self, bag: Path) -> None:
        import rclpy
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import Image
        from std_msgs.msg import String

        context = rclpy.Context()
        rclpy.init(context=context)
        node = rclpy.create_node("listener", context=context)
        ages: list[float] = []
        instructions: list[str] = []

        def on_image(message: Image) -> None:
            stamp = message.header.stamp
            ages.append(time.time() - stamp.sec - stamp.nanosec / 1e9)

        node.create_subscription(Image, "/top/image_raw", on_image, qos_profile_sensor_data)
        node.create_subscription(String, "/instruction", lambda m: instructions.append(m.data), 10)
        executor = rclpy.executors.SingleThreadedExecutor(context=context)
        executor.add_node(node)
        player = subprocess.Popen(
            [sys.executable, "-m", "vla_infer.demo.player", str(bag), "--speed", "4"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and (len(ages) < 40 or len(instructions) < 2):
                executor.spin_once(timeout_sec=0.1)
        finally:
            player.send_signal(signal.SIGINT)
            output, _ = player.communicate(timeout=10)
            executor.shutdown()
            node.destroy_node()
            rclpy.shutdown(context=context)
        assert len(ages) >= 40  # 15 in the bag: it looped
        assert 0 <= np.median(ages) < 1
        assert set(instructions) == {scene.INSTRUCTION}
        assert player.returncode == 0
        assert "messages sent" in output

    def test_what_is_played_once_comes_in_the_first_round_alone(self, bag: Path) -> None:
        import threading

        from vla_infer.demo.player import Bag, play, read_bag

        recording = read_bag(bag)
        few = tuple(m for m in recording.messages if m.topic in ("/instruction", "/joint_states"))
        short = Bag(few, 50_000_000, recording.types, recording.qos)
        stop = threading.Event()
        threading.Timer(0.5, stop.set).start()
        sent = play(short, speed=10.0, wait=0.0, stop=stop, once=["/instruction"])
        joints = sum(message.topic == "/joint_states" for message in few)
        assert len(few) == joints + 1
        assert sent > 2 * joints
        stop.clear()
        threading.Timer(5.0, stop.set).start()
        alone = Bag(
            tuple(m for m in few if m.topic == "/instruction"), 50_000_000, recording.types, recording.qos
        )
        assert play(alone, speed=10.0, wait=0.0, stop=stop, once=["/instruction"]) == 1  # and it ends
