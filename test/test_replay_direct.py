"""Direct replay: what is read from a bag, what a virtual run of it is, and the figures made of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="needs opencv-python-headless")
pytest.importorskip("rosbags", reason="needs rosbags")

from replay_support import COMMANDS, START, KnownPolicy, joints_at, write_bag
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from vla_infer.contract import Contract, load_contract
from vla_infer.errors import ReplayError
from vla_infer.replay import agreement, metrics
from vla_infer.replay.bag import Bag, BagMessage, Preload, header_stamp, with_stamp
from vla_infer.replay.direct import DirectOptions, replay_direct
from vla_infer.replay.observe import Stamps, map_topics
from vla_infer.replay.trace import Trace, observation_key


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract("so101")


@pytest.fixture(scope="module")
def bag_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bag(tmp_path_factory.mktemp("bags") / "two", seconds=2.0)


def replay(path: Path, contract: Contract, policy: KnownPolicy, **options: object) -> Trace:
    bag = Bag(path)
    made = DirectOptions(clock=policy.clock, cpu_clock=policy.cpu_clock, **options)  # type: ignore[arg-type]
    return replay_direct(policy, contract, bag, map_topics(bag, contract, {}), made)


# ------------------------------------------------------------------------ bag
@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
@pytest.mark.parametrize("compression", [None, CompressionMode.MESSAGE, CompressionMode.FILE])
def test_every_storage_gives_the_same_messages(
    tmp_path: Path, bag_path: Path, plugin: StoragePlugin, compression: CompressionMode | None
) -> None:
    path = write_bag(tmp_path / "bag", seconds=2.0, plugin=plugin, compression=compression)
    topics = list(Bag(path).topics)
    assert sorted(Bag(path).messages(topics)) == sorted(Bag(bag_path).messages(topics))
    storage = Bag(path).files()[0]
    assert Bag(storage).count == Bag(path).count  # a file of a recording stands for the recording


def test_damaged_bags_are_one_line(tmp_path: Path, bag_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bag_path, damaged)
    file = next(damaged.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[:-5000])
    for path in (damaged, tmp_path / "absent", tmp_path):
        with pytest.raises(ReplayError) as caught:
            list(Bag(path).messages(["/joint_states"]))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_digest_is_of_the_content_however_stored(tmp_path: Path, bag_path: Path) -> None:
    same = write_bag(
        tmp_path / "same", seconds=2.0, plugin=StoragePlugin.SQLITE3, compression=CompressionMode.MESSAGE
    )
    assert Bag(same).digest() == Bag(bag_path).digest()
    other = write_bag(tmp_path / "other", seconds=2.0, size=(48, 35))
    assert Bag(other).digest() != Bag(bag_path).digest()
    pixels = write_bag(tmp_path / "pixels", seconds=2.0, seed=1)  # as many bytes, but others
    assert Bag(pixels).digest() != Bag(bag_path).digest()
    later = write_bag(tmp_path / "later", seconds=2.0, delay=0.001)
    assert Bag(later).digest() != Bag(bag_path).digest()


def test_stamp_of_serialized_message(bag_path: Path) -> None:
    message = next(Bag(bag_path).messages(["/top/image_raw"]))
    assert header_stamp(message.data) == START
    moved = with_stamp(message.data, 5_000_000_007)
    assert header_stamp(moved) == 5_000_000_007
    assert with_stamp(moved, START) == message.data


def size(message: BagMessage) -> int:
    return len(message.data)


def test_preload_holds_no_more_than_its_limit() -> None:
    def source() -> Iterator[BagMessage]:
        for i in range(100):
            yield BagMessage(i, "/t", bytes(1000))

    preload = Preload(source(), size, limit=10_500)
    preload.fill()
    assert preload.peak == 10_000
    assert [message.time for message in preload] == list(range(100))
    assert preload.peak == 10_000
    preload.close()


def test_preload_passes_on_what_went_wrong_and_can_be_left() -> None:
    def broken() -> Iterator[BagMessage]:
        yield BagMessage(0, "/t", b"x")
        raise ReplayError("the disk is gone")

    preload = Preload(broken(), size)
    with pytest.raises(ReplayError, match="the disk is gone"):
        list(preload)
    many = Preload((BagMessage(i, "/t", bytes(1000)) for i in range(1000)), size, limit=2000)
    next(iter(many))
    many.close()  # joins the reader, which waits for room


# -------------------------------------------------------------------- topics
def test_missing_topic_names_remap(bag_path: Path, contract: Contract, tmp_path: Path) -> None:
    from dataclasses import replace

    first, second = contract.cameras
    other = replace(contract, cameras=(replace(first, topic="cam/image"), second))
    with pytest.raises(ReplayError, match=r"cam/image.*the bag has /top/image_raw.*--remap cam/image:=TOPIC"):
        map_topics(Bag(bag_path), other, {})
    topics = map_topics(Bag(bag_path), other, {"cam/image": "/top/image_raw"})
    assert topics.cameras["/top/image_raw"].feature == first.feature
    with pytest.raises(ReplayError, match="/top/image_ra: no such topic"):
        map_topics(Bag(bag_path), other, {"cam/image": "/top/image_ra"})
    with pytest.raises(ReplayError, match="the contract has no such topic"):
        map_topics(Bag(bag_path), contract, {"tip/image_raw": "/top/image_raw"})
    wrong = replace(contract, cameras=(replace(first, type="sensor_msgs/msg/CompressedImage"), second))
    with pytest.raises(ReplayError, match="change `type` in the contract"):
        map_topics(Bag(bag_path), wrong, {})


@pytest.mark.parametrize(("delay", "kept"), [(0.03, True), (3600.0, False)])
def test_stamps_of_another_clock_are_replaced(
    tmp_path: Path, contract: Contract, delay: float, *, kept: bool
) -> None:
    bag = Bag(write_bag(tmp_path / "bag", delay=delay))
    topics = map_topics(bag, contract, {})
    stamps = Stamps(bag, topics)
    message = next(bag.messages(["/wrist/image_raw"]))
    behind = (message.time - stamps.stamp(message)) * 1e-9
    assert behind == pytest.approx(delay if kept else 0.0)
    assert bool(stamps.replaced) is not kept


# ----------------------------------------------------------------------- run
def test_virtual_run_is_what_a_robot_would_see(bag_path: Path, contract: Contract) -> None:
    """With an engine of 50 ms everything can be told beforehand, from the bag's times alone."""
    policy = KnownPolicy(engine=0.05)
    trace = replay(bag_path, contract, policy)
    taken = np.array([one.taken for one in trace.inferences])
    assert np.diff(taken).min() >= 0.05 - 1e-9  # one inference at a time
    for one in trace.inferences:
        assert one.ready - one.taken == pytest.approx(0.05)
        assert -1e-9 <= one.taken - one.stamp < 0.0334 + 0.004  # the newest pair of images there is
        images, state, task = policy.calls[one.sequence - 1]
        assert task == "pick up the red cube"
        assert one.key == observation_key(images, state, task)
        # The state is the one recorded nearest to the image, at most half of 20 ms away.
        np.testing.assert_allclose(np.deg2rad(state[:5]), joints_at(one.bag_time)[:5], atol=0.0065)
    for tick in trace.ticks:
        if tick.chunk is None:
            continue
        source = trace.inferences[tick.chunk - 1]
        assert source.ready <= tick.time + 1e-9  # no command before its chunk exists
        newer = [
            one for one in trace.inferences if one.ready <= tick.time - 1e-9 and one.stamp > source.stamp
        ]
        assert not newer  # and none from an older chunk than there is
        assert tick.age == pytest.approx(tick.time - source.stamp, abs=2e-8)
        assert tick.row == int((tick.age or 0) * contract.policy_rate + 1e-6)
    assert len(trace.ticks) == int(trace.duration * 50) + 1


def test_noise_is_seeded_by_the_observation(bag_path: Path, contract: Contract) -> None:
    fast, slow = KnownPolicy(engine=0.001), KnownPolicy(engine=0.07)
    traces = [replay(bag_path, contract, policy) for policy in (fast, slow)]
    seeds = [
        dict(zip((one.key for one in trace.inferences), policy.seeds, strict=True))
        for trace, policy in zip(traces, (fast, slow), strict=True)
    ]
    common = seeds[0].keys() & seeds[1].keys()
    assert common
    assert all(seeds[0][key] == seeds[1][key] for key in common)
    assert len(set(seeds[0].values())) == len(seeds[0])


def test_every_frame_infers_all_and_times_nothing(bag_path: Path, contract: Contract) -> None:
    trace = replay(bag_path, contract, KnownPolicy(engine=5.0), every_frame=True)
    assert len({one.stamp for one in trace.inferences}) == 60
    assert not trace.ticks
    assert metrics.control(trace, deadline=0.2) is None
    assert not metrics.samples(trace, warmup=0)["capture_to_chunk"].size


def test_slow_engine_starves_and_drops(bag_path: Path, contract: Contract) -> None:
    """Ten actions of 1/30 s last 0.33 s from the stamp; at 0.3 s an inference most ticks have none."""
    trace = replay(bag_path, contract, KnownPolicy(engine=0.3))
    control = metrics.control(trace, deadline=0.2)
    assert control is not None
    assert control["starvation_s"] > 1.0
    assert control["starvations"] >= 4
    assert control["deadline_misses"] == control["commands_played"] > 0  # none is younger than 300 ms
    frames = metrics.frames(trace)
    assert frames["dropped"] == 60 - len(trace.inferences) > 50


def test_bad_messages_are_counted_not_fatal(tmp_path: Path, contract: Contract) -> None:
    from vla_infer.replay import observe

    bag = Bag(write_bag(tmp_path / "bag"))
    topics = map_topics(bag, contract, {})
    from vla_infer.frame import FrameBuffer, Now

    feeder = observe.Feeder(contract, topics, FrameBuffer(contract), instruction="")
    now = Now(1.0, START + 1_000_000_000)
    good = next(bag.messages(["/top/image_raw"])).data
    assert feeder.feed("/top/image_raw", good, now)
    for data in (good[:40], good[:2], b"", good[:-7]):
        assert not feeder.feed("/top/image_raw", data, now)
    assert not feeder.feed("/top/image_raw", with_stamp(good, START - 5_000_000), now)
    assert feeder.rejected["/top/image_raw"] == 5
    assert feeder.reordered["/top/image_raw"] == 1


def test_run_without_observation_says_why(tmp_path: Path, contract: Contract) -> None:
    from dataclasses import replace

    bag = Bag(write_bag(tmp_path / "bag"))
    tight = replace(contract, sync_slop=0.0)
    topics = map_topics(bag, tight, {})
    with pytest.raises(ReplayError, match=r"no observation could be made: .*expected at most sync_slop"):
        replay_direct(KnownPolicy(), tight, bag, topics, DirectOptions())


# ------------------------------------------------------------------- metrics
def test_summary_and_seams() -> None:
    figures = metrics.summary(np.arange(1001.0))
    assert figures is not None
    assert (figures["p50"], figures["p99"], figures["p99.9"], figures["max"]) == (500, 990, 999, 1000)
    assert metrics.summary([]) is None


def test_ros2_benchmark_names(bag_path: Path, contract: Contract) -> None:
    trace = replay(bag_path, contract, KnownPolicy(engine=0.001))
    names = metrics.ros2_benchmark(trace)
    assert names["NUM_FRAMES_SENT"] == 60
    assert names["MEAN_PLAYBACK_FRAME_RATE"] == pytest.approx(30, rel=1e-3)
    firsts = metrics.first_commands(trace)
    assert names["NUM_MISSED_FRAMES"] == max(0, 60 - len(firsts))
    times = sorted(tick.time for tick in firsts.values())
    assert names["RECEIVED_DURATION"] == pytest.approx(1e3 * (times[-1] - times[0]), abs=1e-3)
    assert names["MEAN_FRAME_RATE"] == pytest.approx((len(times) - 1) / (times[-1] - times[0]), rel=1e-3)


# ----------------------------------------------------------------- agreement
def test_agreement_with_recorded_commands(bag_path: Path, contract: Contract) -> None:
    """Commands are the joints' motion 0.1 s later; the policy answers with the state, so the error is known."""
    bag = Bag(bag_path)
    recorded = agreement.read_recorded(bag, contract, map_topics(bag, contract, {}))
    assert recorded is not None
    assert recorded.source == "commands"
    trace = replay(bag_path, contract, KnownPolicy(engine=0.001), every_frame=True)
    one = trace.inferences[20]
    found = agreement.recorded_chunk(recorded, one, contract.policy_rate)
    times = one.bag_time + np.arange(10) / contract.policy_rate
    expected = np.rad2deg([joints_at(t + 0.1) for t in times])
    np.testing.assert_allclose(found[:, :5], expected[:, :5], atol=0.02)
    errors = agreement.agreement(trace, recorded)
    assert errors is not None
    hand = [
        np.abs(one.actions[:, 0] - agreement.recorded_chunk(recorded, one, contract.policy_rate)[:, 0])
        for one in trace.inferences
    ]
    assert errors["joints"]["shoulder_pan"]["mae"] == pytest.approx(np.nanmean(hand), rel=1e-5)
    assert errors["mae_per_step"][3][0] == pytest.approx(np.nanmean([row[3] for row in hand]), rel=1e-5)


def test_agreement_falls_back_to_states(tmp_path: Path, contract: Contract) -> None:
    bag = Bag(write_bag(tmp_path / "bag", commands=False))
    assert COMMANDS not in bag.topics
    recorded = agreement.read_recorded(bag, contract, map_topics(bag, contract, {}))
    assert recorded is not None
    assert recorded.source == "states"
    np.testing.assert_allclose(recorded.at(1, np.array([0.5])), np.rad2deg(joints_at(0.5)[1]), rtol=1e-4)
    assert np.isnan(recorded.at(1, np.array([-0.1, 9.0]))).all()


# ---------------------------------------------------------------------- live
def test_live_and_bag_give_identical_frames(bag_path: Path, contract: Contract) -> None:
    """The same bytes through rclpy's types, as the node gets them, and through rosbags' types."""
    pytest.importorskip("rclpy", reason="needs ROS 2 (rclpy)")
    from rclpy.serialization import deserialize_message

    from vla_infer.codecs import CODECS, message_class, stamp_ns
    from vla_infer.frame import FrameBuffer, Now
    from vla_infer.replay.observe import Feeder

    bag = Bag(bag_path)
    topics = map_topics(bag, contract, {})
    ours, live = FrameBuffer(contract), FrameBuffer(contract)
    feeder = Feeder(contract, topics, ours, instruction="")
    compared = 0
    for message in bag.messages(topics.inputs):
        now = Now(message.time * 1e-9, START + message.time)
        assert feeder.feed(message.topic, message.data, now)
        received = deserialize_message(message.data, message_class(topics.types[message.topic]))
        if message.topic in topics.cameras:
            live.add_image(topics.cameras[message.topic].feature, received, stamp_ns(received), now)
        elif message.topic in topics.states:
            sample = CODECS["sensor_msgs/msg/JointState"].decode(received)
            live.add_state(0, sample, stamp_ns(received), now)
        a, b = ours.take(now), live.take(now)
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        assert (a.stamp, a.observed_at, a.sequence) == (b.stamp, b.observed_at, b.sequence)
        np.testing.assert_array_equal(a.state, b.state)
        for feature in a.images:
            np.testing.assert_array_equal(a.images[feature], b.images[feature])
        compared += 1
    assert compared > 50
