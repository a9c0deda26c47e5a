"""LeRobot datasets of both layouts, written here, imported and replayed."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")
pytest.importorskip("pyarrow", reason="needs pyarrow")
pytest.importorskip("av", reason="needs PyAV")

import av
import pyarrow as pa
import pyarrow.parquet as pq
from replay_support import KnownPolicy

from vla_infer import import_lerobot
from vla_infer.codecs import CODECS
from vla_infer.contract import load_contract
from vla_infer.errors import ReplayError
from vla_infer.replay.agreement import read_recorded
from vla_infer.replay.bag import Bag, Decoder, header_stamp
from vla_infer.replay.direct import DirectOptions, replay_direct
from vla_infer.replay.observe import map_topics

FPS, ROWS, SIZE = 30, 20, 64
NAMES = [
    "shoulder_pan.pos",
    "shoulder_lift.pos",
    "elbow_flex.pos",
    "wrist_flex.pos",
    "wrist_roll.pos",
    "gripper.pos",
]
CAMERAS = ("observation.images.top", "observation.images.wrist")


def state(episode: int, row: int) -> np.ndarray:
    return np.float32(10 * episode + row / 4 + np.arange(6))


def picture(episode: int, row: int, camera: int) -> np.ndarray:
    """Two grey halves that a lossy codec keeps: the row by the left one, episode and camera by the right."""
    image = np.full((SIZE, SIZE, 3), 30 + 10 * row, np.uint8)
    image[:, SIZE // 2 :] = 30 + 60 * episode + 90 * camera
    return image


def write_video(path: Path, episodes: list[int], camera: int, *, rows: int = ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"qscale": "1"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for episode in episodes:
            for row in range(rows):
                frame = av.VideoFrame.from_ndarray(picture(episode, row, camera), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def table(episode: int) -> dict[str, list[Any]]:
    return {
        "timestamp": [np.float32(row / FPS) for row in range(ROWS)],
        "episode_index": [episode] * ROWS,
        "task_index": [episode] * ROWS,
        "observation.state": [state(episode, row).tolist() for row in range(ROWS)],
        "action": [(state(episode, row) + 0.5).tolist() for row in range(ROWS)],
    }


def write_dataset(root: Path, version: str) -> Path:
    """Two episodes of ROWS rows with tasks 'task 0' and 'task 1'."""
    meta = root / "meta"
    meta.mkdir(parents=True)
    old = version == "v2.1"
    info = {
        "codebase_version": version, "fps": FPS, "total_episodes": 2, "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet" if old
        else "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4" if old
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [6], "names": NAMES if old else {"motors": NAMES}},
            "action": {"dtype": "float32", "shape": [6], "names": NAMES},
            **{name: {"dtype": "video", "shape": [SIZE, SIZE, 3]} for name in CAMERAS},
            "observation.images.depth": {
                "dtype": "video", "shape": [SIZE, SIZE, 1], "info": {"video.is_depth_map": True},
            },
        },
    }  # fmt: skip
    (meta / "info.json").write_text(json.dumps(info))
    if old:
        rows = [json.dumps({"task_index": i, "task": f"task {i}"}) for i in (0, 1)]
        (meta / "tasks.jsonl").write_text("\n".join(rows) + "\n")
        for episode in (0, 1):
            place = {"episode_chunk": 0, "episode_index": episode}
            path = root / info["data_path"].format(**place)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(table(episode)), path)
            for number, name in enumerate(CAMERAS):
                write_video(root / info["video_path"].format(**place, video_key=name), [episode], number)
        return root
    place = {"chunk_index": 0, "file_index": 0}
    path = root / info["data_path"].format(**place)
    path.parent.mkdir(parents=True)
    both = {name: table(0)[name] + table(1)[name] for name in table(0)}
    pq.write_table(pa.table(both), path)
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]}), meta / "tasks.parquet"
    )
    rows = {"episode_index": [0, 1], "data/chunk_index": [0, 0], "data/file_index": [0, 0]}
    for number, name in enumerate(CAMERAS):
        rows |= {f"videos/{name}/chunk_index": [0, 0], f"videos/{name}/file_index": [0, 0]}
        rows[f"videos/{name}/from_timestamp"] = [0.0, ROWS / FPS]
        write_video(root / info["video_path"].format(**place, video_key=name), [0, 1], number)
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
    return root


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    import_lerobot.add_arguments(parser)
    return import_lerobot.main(parser.parse_args(list(words)))


@pytest.fixture(scope="module", params=["v2.1", "v3.0"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", request.param)


@pytest.mark.parametrize("name", ["out.mcap", "out.db3", "out"])
def test_recording_has_what_the_dataset_has(dataset: Path, tmp_path: Path, name: str) -> None:
    assert run(str(dataset), str(tmp_path / name), "--episode", "1") == 0
    bag, decode = Bag(tmp_path / name), Decoder()
    assert {topic: info.count for topic, info in bag.topics.items()} == {
        "/top/image_raw": ROWS, "/wrist/image_raw": ROWS, "/joint_states": ROWS, "/commands": ROWS, "/instruction": 1,
    }  # fmt: skip
    seen = dict.fromkeys(bag.topics, 0)
    for message in bag.messages(list(bag.topics)):
        kind, row = bag.topics[message.topic].type, seen[message.topic]
        seen[message.topic] += 1
        value = decode(message.data, kind)
        if message.topic == "/instruction":
            assert value.data == "task 1"
        elif message.topic == "/joint_states":
            assert list(value.name) == [n.removesuffix(".pos") for n in NAMES]
            np.testing.assert_allclose(value.position, state(1, row), rtol=1e-6)
            assert header_stamp(message.data) - bag.start == pytest.approx(row / FPS * 1e9, abs=100)
        elif message.topic == "/commands":
            np.testing.assert_allclose(value.data, state(1, row) + 0.5, rtol=1e-6)
        else:
            image = CODECS[kind].decode(value)
            wanted = picture(1, row, "wrist" in message.topic)
            # A row differs from the next by 10: less than half of it shows that it is this one.
            error = image.astype(int) - wanted
            assert abs(error[8:-8, 8:24].mean()) < 5, row
            assert abs(error[8:-8, 40:56].mean()) < 5, row


def test_imported_recording_can_be_replayed(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mcap"
    assert run(str(dataset), str(out), "--episode", "0", "1") == 0
    contract, bag = load_contract(tmp_path / "out.yaml"), Bag(out)
    topics = map_topics(bag, contract, {})
    policy = KnownPolicy(engine=0.001)
    trace = replay_direct(policy, contract, bag, topics, DirectOptions(every_frame=True, clock=policy.clock))
    assert len(trace.inferences) == 2 * ROWS
    np.testing.assert_allclose(policy.calls[ROWS + 3][1], state(1, 3), rtol=1e-6)
    assert policy.calls[ROWS + 3][2] == "task 1"
    recorded = read_recorded(bag, contract, topics)
    assert recorded is not None
    assert recorded.source == "commands"


def test_contract_of_a_robot_converts_units(dataset: Path, tmp_path: Path) -> None:
    """Numbers of the dataset are the policy's: the robot's are radians, and reading gives the policy's back."""
    out = tmp_path / "out.mcap"
    assert run(str(dataset), str(out), "--contract", "so101") == 0
    bag, contract = Bag(out), load_contract("so101")
    message = next(bag.messages(["/joint_states"]))
    value = Decoder()(message.data, "sensor_msgs/msg/JointState")
    assert value.position[1] == pytest.approx(np.deg2rad(1.0), rel=1e-5)
    policy = KnownPolicy()
    options = DirectOptions(every_frame=True, clock=policy.clock)
    replay_direct(policy, contract, bag, map_topics(bag, contract, {}), options)
    np.testing.assert_allclose(policy.calls[4][1], state(0, 4), rtol=1e-5)


@pytest.mark.parametrize("contract", ["aloha", "lekiwi"])
def test_contract_that_does_not_fit_is_named(dataset: Path, tmp_path: Path, contract: str) -> None:
    with pytest.raises(ReplayError, match=f"{contract}.yaml: state has"):
        run(str(dataset), str(tmp_path / "out.mcap"), "--contract", contract)
    assert not (tmp_path / "out.mcap").exists()


def test_every_command_type_is_written_and_read(tmp_path: Path) -> None:
    """What import writes, the codecs read: trajectories of two arms, and an arm with a base."""
    from vla_infer.codecs import COMMAND_CODECS

    for name in ("aloha", "lekiwi"):
        contract = load_contract(name)
        action = np.linspace(-1.0, 1.0, contract.action_dim)
        maker = import_lerobot._Maker(contract)
        at = 0
        for (_, _, kind, data), sink in zip(maker._commands(10**18, action), contract.commands, strict=True):
            value = COMMAND_CODECS[kind].decode(Decoder()(data, kind))
            wanted = dict(zip(sink.joints, sink.units.to_ros(action[at : at + sink.size]), strict=True))
            got = dict(zip(value.names or sink.joints, value.values[0], strict=True))
            assert {joint: got[joint] for joint in wanted} == pytest.approx(wanted)
            at += sink.size


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda root: (root / "meta" / "info.json").unlink(), r"info\.json: cannot be read"),
        (lambda root: (root / "meta" / "info.json").write_text("[]"), r"expected a JSON object"),
        (lambda root: min((root / "data").rglob("*.parquet")).write_bytes(b"PAR1"), "cannot be read"),
        (lambda root: min((root / "videos").rglob("*.mp4")).write_bytes(b"\0" * 100), "cannot be decoded"),
        (
            lambda root: write_video(min((root / "videos").rglob("*.mp4")), [0], 0, rows=5),
            r"the video of observation\.images\.top ends at row 5",
        ),
    ],
)
def test_damaged_dataset_is_one_line(tmp_path: Path, damage: Any, complaint: str) -> None:
    root = write_dataset(tmp_path / "set", "v2.1")
    damage(root)
    with pytest.raises(ReplayError, match=complaint) as caught:
        run(str(root), str(tmp_path / "out.mcap"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.mcap").exists()


def test_no_such_episode(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="episode 2: expected 0 to 1"):
        run(str(dataset), str(tmp_path / "out.mcap"), "--episode", "2")
