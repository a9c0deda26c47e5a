"""The simulated arm without ROS: tasks in words, scenes by seed, the world, and the expert in it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sim_support import need_simulation, play, world  # noqa: F401 (a fixture)

from vla_infer.codecs import Setpoint
from vla_infer.contract import load_contract
from vla_infer.errors import ObservationError
from vla_infer.sim.meshes import decimate, read_stl
from vla_infer.sim.model import CAMERAS, JOINTS
from vla_infer.sim.scene import LANE, REACH_X, REACH_Y, ROW, make_scene
from vla_infer.sim.tasks import COLOURS, KINDS, Task, parse, phrases, with_colour
from vla_infer.sim.trajectory import Trajectory

ALL = list(itertools.product(KINDS, COLOURS))


def test_no_sentence_of_eval_is_in_train_but_each_of_its_words_is() -> None:
    train = {text for kind, colour in ALL for text in phrases(kind, colour, "train")}
    unseen = {text for kind, colour in ALL for text in phrases(kind, colour, "eval")}
    assert len(unseen) >= 3 * len(ALL)
    assert not train & unseen
    assert {word for text in unseen for word in text.split()} <= {
        word for text in train for word in text.split()
    }


def test_a_sentence_names_one_task_whatever_its_case() -> None:
    for kind, colour in ALL:
        for split in ("train", "eval"):
            for text in phrases(kind, colour, split):
                task = parse(f"  {text.upper()}. ")
                assert task == Task(kind, colour, text)
    assert parse("make coffee") is None
    with pytest.raises(ValueError, match="expected one of red, green"):
        phrases("touch", "pink")


def test_another_colour_in_the_same_words() -> None:
    task = Task("push_left", "red", "push the red block left")
    assert with_colour(task, "blue") == Task("push_left", "blue", "push the blue block left")


def test_a_scene_is_its_seed_s_and_its_split_s() -> None:
    first, again, other = make_scene(5, "train"), make_scene(5, "train"), make_scene(5, "eval")
    assert first.task == again.task
    assert first.cubes == again.cubes
    assert np.array_equal(first.start, again.start)
    assert first.cubes != other.cubes


def test_scenes_give_every_cube_room_and_nothing_but_words_name_the_goal() -> None:
    scenes = [make_scene(seed, "train") for seed in range(300)]
    for scene in scenes:
        assert scene.task.colour in scene.cubes
        assert len(scene.cubes) in (2, 3)
        for x, y, _ in scene.cubes.values():
            assert REACH_X[0] <= x <= REACH_X[1]
            assert REACH_Y[0] <= y <= REACH_Y[1]
        for one, two in itertools.combinations(scene.cubes.values(), 2):
            assert abs(one[0] - two[0]) >= ROW or abs(one[1] - two[1]) >= LANE
    # The same seed for another kind of task has its cubes in the same places.
    assert make_scene(0, "train", ["touch"]).cubes == make_scene(0, "train", ["pick"]).cubes
    assert {(scene.task.kind, scene.task.colour) for scene in scenes} == set(ALL)
    ranks = [sorted(scene.cubes).index(scene.task.colour) / (len(scene.cubes) - 1) for scene in scenes]
    assert 0.4 < np.mean(ranks) < 0.6


def test_names_and_limits_are_those_of_the_contract(world: Any) -> None:  # noqa: F811
    contract = load_contract("so101")
    assert tuple(camera.feature for camera in contract.cameras) == tuple(CAMERAS)
    assert contract.states[0].joints == contract.commands[0].joints == JOINTS
    for limit, (low, high) in zip(contract.commands[0].limits, world.limits, strict=True):
        assert limit.position is not None
        assert low - 1e-4 <= limit.position[0] < limit.position[1] <= high + 1e-4


def test_the_same_seed_and_commands_give_the_same_numbers_and_pixels(world: Any) -> None:  # noqa: F811
    def run(seed: int) -> tuple[Any, Any]:
        world.reset(seed)
        world.command(world.commanded + 0.3)
        world.advance(0.205)
        world.advance(0.195)
        assert world.time == pytest.approx(0.4)
        return world.joints()[0], world.images()

    (joints, images), (again, same), (other, _) = run(3), run(3), run(4)
    assert np.array_equal(joints, again)
    assert not np.array_equal(joints, other)
    assert set(images) == set(CAMERAS)
    for feature in CAMERAS:
        assert images[feature].shape == (96, 96, 3)
        assert images[feature].dtype == np.uint8
        assert np.array_equal(images[feature], same[feature])


def in_top_image(world: Any, point: Any) -> tuple[int, int]:  # noqa: F811
    """Row and column of a point (m) in the top camera's image."""
    camera = world.model.camera("top").id
    across, up, back = (
        (point - world.data.cam_xpos[camera]) @ world.data.cam_xmat[camera].reshape(3, 3)
    ).tolist()
    focal = 48 / np.tan(np.radians(world.model.cam_fovy[camera]) / 2)
    return round(48 + focal * up / back - 0.5), round(48 - focal * across / back - 0.5)


def test_cubes_are_where_and_of_the_colour_that_the_top_image_shows(world: Any) -> None:  # noqa: F811
    channels = {"red": (0,), "green": (1,), "blue": (2,), "purple": (0, 2)}
    for seed in range(12):
        world.reset(seed)
        image = world.images()["observation.images.top"].astype(int)
        for colour in world.scene.cubes:
            row, column = in_top_image(world, world.cube(colour) + (0, 0, 0.02))
            pixel = image[row, column]
            strong = pixel[list(channels[colour])].min()
            weak = np.delete(pixel, channels[colour]).max()
            assert strong > 1.6 * weak, f"seed {seed}, {colour} at {row}, {column}: {pixel}"
            assert (column < 48) == (world.cube(colour)[1] > 0) or abs(column - 48) < 3  # left is left


def test_a_servo_keeps_its_limits_and_its_speed(world: Any) -> None:  # noqa: F811
    from vla_infer.sim.world import SERVO_SPEED

    world.reset(0)
    before = world.joints()[0]
    world.command([-9.0, before[1], before[2], -9.0, 9.0, 9.0])
    world.advance(2.0)
    assert world.commanded[0] == pytest.approx(-1.91986)
    joints = world.joints()[0]
    assert joints[[0, 3, 4, 5]] == pytest.approx(world.limits[[0, 3, 4, 5], [0, 0, 1, 1]], abs=0.05)
    world.command([9.0, *world.commanded[1:]])
    world.advance(0.6)
    travelled = world.joints()[0][0] - joints[0]
    assert 0.8 * 0.6 * SERVO_SPEED < travelled < 0.6 * SERVO_SPEED


@pytest.mark.parametrize("wrong", [[np.nan] * 6, [0.0] * 5, [0.0, 0.0, np.inf, 0.0, 0.0, 0.0]])
def test_a_command_that_is_no_position_changes_nothing(world: Any, wrong: list[float]) -> None:  # noqa: F811
    world.reset(0)
    before = world.commanded
    with pytest.raises(ValueError, match="expected 6 finite positions"):
        world.command(wrong)
    assert np.array_equal(world.commanded, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_does_what_is_asked_and_nothing_else(world: Any, kind: str) -> None:  # noqa: F811
    limits = load_contract("so101").commands[0].limits
    for seed in range(3):
        task = world.reset(seed, kinds=[kind])
        assert not world.succeeded(task)
        rates = np.diff(play(world, task, seed=seed), axis=0) * 30.0
        assert world.succeeded(task), f"{task} of seed {seed}"
        other = next(colour for colour in world.scene.cubes if colour != task.colour)
        assert not world.succeeded(with_colour(task, other))
        side = {"push_left": "push_right", "push_right": "push_left"}.get(kind)
        if side:
            assert world.failed(Task(side, task.colour, ""))
            assert (world.moved(task.colour)[1] > 0.04) == (kind == "push_left")
        for joint, limit in enumerate(limits):
            assert limit.velocity is not None
            assert limit.acceleration is not None
            assert np.abs(rates[:, joint]).max() <= limit.velocity
            assert np.abs(np.diff(rates[:, joint])).max() * 30.0 <= limit.acceleration


def test_the_wrong_cube_fails_the_task(world: Any) -> None:  # noqa: F811
    for kind in ("touch", "push_left"):
        task = world.reset(1, kinds=[kind])
        other = next(colour for colour in world.scene.cubes if colour != task.colour)
        wrong = with_colour(task, other)
        play(world, wrong)
        assert world.succeeded(wrong)
        assert world.failed(task)
        assert not world.succeeded(task)
        world.mark()
        assert not world.failed(task)
        assert not world.succeeded(wrong)


def test_decimation_keeps_the_shape(tmp_path: Path) -> None:
    step = np.linspace(0, 0.1, 21)
    corners = []
    for x0, x1 in itertools.pairwise(step):
        for y0, y1 in itertools.pairwise(step):
            corners += [[(x0, y0, 0), (x1, y0, 0), (x1, y1, 0)], [(x0, y0, 0), (x1, y1, 0), (x0, y1, 0)]]
    sheet = np.array(corners, np.float32)
    vertices, faces = decimate(sheet, 0.02)
    assert len(faces) < len(sheet) / 10
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    assert (normals[:, 2] > 0).all()  # none is turned over
    assert 0.5 * normals[:, 2].sum() == pytest.approx(0.01, rel=0.25)  # m²
    record = np.zeros(len(sheet), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    record["corners"] = sheet
    data = bytes(80) + len(sheet).to_bytes(4, "little") + record.tobytes()
    (tmp_path / "sheet.stl").write_bytes(data)
    assert np.array_equal(read_stl(tmp_path / "sheet.stl"), sheet)
    (tmp_path / "short.stl").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="cut short"):
        read_stl(tmp_path / "short.stl")


def test_a_trajectory_is_followed_from_point_to_point() -> None:
    setpoint = Setpoint(("b", "a"), "position", np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([1.0, 2.0]))
    path = Trajectory(setpoint, ("a", "b", "c"), 10.0, np.array([0.0, 0.0, 7.0]))
    assert path.at(9.0).tolist() == [0.0, 0.0, 7.0]
    assert path.at(10.5).tolist() == [1.0, 0.5, 7.0]
    assert path.at(11.5).tolist() == [2.0, 2.0, 7.0]
    assert path.at(99.0).tolist() == [2.0, 3.0, 7.0]
    at_once = Trajectory(
        Setpoint(("a",), "position", np.array([[1.0]]), np.zeros(1)), ("a",), 0.0, np.zeros(1)
    )
    assert at_once.at(0.0).tolist() == [1.0]


@pytest.mark.parametrize(
    ("names", "values", "times"),
    [
        (("x",), [[1.0]], [0.0]),
        (("a", "a"), [[1.0, 1.0]], [0.0]),
        (("a",), [[np.nan]], [0.0]),
        (("a",), [[1.0], [1.0]], [2.0, 1.0]),
        (("a",), [[1.0]], [-1.0]),
        (("a",), [[1.0]], [np.nan]),
    ],
)
def test_a_trajectory_that_is_wrong_is_refused(names: Any, values: Any, times: Any) -> None:
    setpoint = Setpoint(names, "position", np.array(values), np.array(times))
    with pytest.raises(ObservationError, match="trajectory: "):
        Trajectory(setpoint, ("a", "b"), 0.0, np.zeros(2))


def test_an_unknown_camera_is_named() -> None:
    need_simulation()
    from vla_infer.sim.world import World

    with pytest.raises(ValueError, match=r"unknown 'observation\.images\.side'"):
        World(cameras=("observation.images.side",))
