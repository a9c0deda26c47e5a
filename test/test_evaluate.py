"""Episodes on a simulated clock, and what is counted of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from vla_infer.contract import load_contract
from vla_infer.errors import VlaInferError
from vla_infer.rtc import Rtc

pytest.importorskip("mujoco", reason="the simulation needs mujoco")

from vla_infer.cli import main as cli
from vla_infer.random_checkpoint import write_random_checkpoint
from vla_infer.sim import latency_plot
from vla_infer.sim.evaluate import Evaluation, Options, evaluate, markdown, summary, wilson
from vla_infer.sim.expert import RATE, Expert
from vla_infer.sim.rollout import Episode, Outcome, run_expert, run_policy, with_mode
from vla_infer.sim.tasks import parse
from vla_infer.sim.world import World
from vla_infer.training.demonstrate import in_picture

SIZE = (32, 32)
CAMERAS = ("observation.images.top", "observation.images.wrist")


@pytest.fixture(scope="module")
def world() -> World:
    try:
        world = World(image_size=SIZE)
        world.reset(0)
        world.images()
    except VlaInferError as error:
        pytest.skip(str(error))
    return world


class Oracle:
    """A policy that looks into the world: the chunk is what the expert would do first, then holding still."""

    def __init__(self, world: World, *, rows: int = 20) -> None:
        self.world, self.rows = world, rows
        self.units = load_contract("so101").commands[0].units
        self.seeds: list[int] = []
        self.rtc: list[Rtc | None] = []
        self.expert: tuple[str, Expert] | None = None

    def seed(self, value: int) -> None:
        self.seeds.append(value)

    def predict(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        task: str,
        *,
        rtc: Rtc | None = None,
    ) -> np.ndarray:
        assert sorted(images) == sorted(CAMERAS)
        assert images[CAMERAS[0]].shape == (*SIZE, 3)
        # degrees, and per cent of the gripper's way
        joints = self.world.joints()[0]
        assert np.allclose(state[:5], np.rad2deg(joints[:5]), atol=1e-3)
        assert state[5] == pytest.approx(100 * (joints[5] + 0.1745) / (1.7453 + 0.1745), abs=1e-2)
        self.rtc.append(rtc)
        if self.expert is None or self.expert[0] != task:
            named = parse(task)
            assert named is not None
            self.expert = (task, Expert(self.world, named, np.random.default_rng(0)))
        step = self.units.to_policy(self.expert[1].act())
        return np.repeat(step[None], self.rows, 0).astype(np.float32)


def test_wilson_interval() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_cubes_are_in_the_picture_where_they_are_said_to_be(world: World) -> None:
    world.reset(5)
    assert world.scene is not None
    picture = world.images()[CAMERAS[0]].astype(float)
    for colour in world.scene.cubes:
        column, row = (in_picture(world, "top", world.cube(colour)[None])[0] * SIZE[0]).astype(int)
        red, green, blue = picture[row, column]
        main = {"red": red, "green": green, "blue": blue, "purple": min(red, blue)}[colour]
        assert main > 1.3 * min(red, green, blue), (colour, row, column, picture[row, column])


def test_expert_touches_what_it_is_told(world: World) -> None:
    outcome = run_expert(world, Episode(3, ("touch",)))
    assert outcome.success
    assert outcome.obeyed
    assert 0.3 < outcome.seconds < 5.0
    assert outcome.squared_jerk > 0


def test_policy_in_the_loop_does_the_task_through_guard_and_units(world: World) -> None:
    outcome = run_policy(world, Oracle(world), load_contract("so101"), Episode(3, ("touch",)))
    assert outcome.success
    assert outcome.ticks == pytest.approx(outcome.seconds * 50, abs=2)
    # One inference an image, each with noise of its own.
    assert outcome.inferences == pytest.approx(outcome.seconds * RATE, abs=2)


def test_latency_is_time_that_passes(world: World) -> None:
    contract, episode = load_contract("so101"), Episode(3, ("touch",), latency=0.2, time_limit=1.5)
    oracle = Oracle(world)
    outcome = run_policy(world, oracle, contract, episode)
    assert outcome.inferences <= 8  # one after the other
    assert len(set(oracle.seeds)) == outcome.inferences
    # Nothing is sent before the first chunk is there, and a chunk that is over leaves the arm where it is.
    stuck = run_policy(world, Oracle(world, rows=5), contract, episode)
    assert not stuck.success
    assert stuck.held_ticks > 0.5 * stuck.ticks


def test_rtc_continues_the_plan(world: World) -> None:
    contract, episode = load_contract("so101"), Episode(3, ("touch",), latency=0.1, time_limit=0.6)
    oracle = Oracle(world)
    run_policy(world, oracle, with_mode(contract, "rtc"), episode)
    assert oracle.rtc[0] is None
    assert oracle.rtc[-1] is not None
    assert oracle.rtc[-1].inference_delay == pytest.approx(4, abs=1)
    oracle = Oracle(world)
    run_policy(world, oracle, with_mode(contract, "latest"), episode)
    assert not any(oracle.rtc)


def test_wrong_instruction_names_another_cube_of_the_scene(world: World) -> None:
    """Who obeys it does not do the scene's task: that is what the control counts."""
    for seed in (1, 2, 3):
        outcome = run_expert(world, Episode(seed, ("touch",), wrong_instruction=True))
        assert outcome.obeyed
        assert not outcome.success
        named = parse(outcome.said)
        assert named is not None
        assert world.scene is not None
        assert named.colour in world.scene.cubes
        assert named.colour != world.scene.task.colour


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, for the robot's two cameras at the size that is drawn fast."""
    root = write_random_checkpoint(tmp_path_factory.mktemp("random"), "smolvla", small=True)
    config = json.loads((root / "config.json").read_text())
    for camera in CAMERAS:
        config["input_features"][camera] = {"type": "VISUAL", "shape": [3, *SIZE]}
    (root / "config.json").write_text(json.dumps(config))
    return root


def options(policy: Path | None, **changes: object) -> Options:
    values: dict[str, object] = {"inference": 0.05, "threads": 1, "time_limit": 0.3}
    return Options(str(policy) if policy else None, episodes=2, **(values | changes))  # type: ignore[arg-type]


def test_same_options_same_outcomes(world: World, policy: Path) -> None:
    first, again = evaluate(options(policy)), evaluate(options(policy))
    assert first.outcomes == again.outcomes
    assert [outcome.seed for outcome in first.outcomes] == [0, 1]
    assert first.outcomes != evaluate(options(policy, latency=0.1)).outcomes
    assert first.outcomes[1:] == evaluate(options(policy, seed=1)).outcomes[:1]
    assert first.fingerprint


def test_reference_and_engine_move_the_arm_alike(world: World, policy: Path) -> None:
    torch = pytest.importorskip("torch", reason="the reference executor needs PyTorch")
    torch.set_num_threads(1)  # tensors this small only wait for more threads
    engine, reference = (
        evaluate(options(policy, device=device, time_limit=0.2, num_steps=2)).outcomes
        for device in ("cpu", "reference")
    )
    for one, other in zip(engine, reference, strict=True):
        assert one.squared_jerk == pytest.approx(other.squared_jerk, rel=0.02)
        assert one.inferences == other.inferences > 0


def test_report_states_what_was_counted() -> None:
    outcomes = (
        Outcome(0, "touch", "a", success=True, obeyed=True, seconds=1.0, ticks=50, guard=Counter(velocity=3)),
        Outcome(1, "touch", "b", success=True, obeyed=True, seconds=3.0, ticks=150, guard=Counter(step=1)),
        Outcome(2, "pick", "c", seconds=10.0, ticks=500, held_ticks=7),
    )
    document = summary(Evaluation(Options("somewhere", 3, inference=0.04), "cpu", "f", outcomes, 1.0))
    assert document["success"]["count"] == 2
    assert document["by_kind"]["pick"]["rate"] == 0.0
    assert document["seconds_to_success"] == 2.0
    assert document["guard"] == {"velocity": 3, "step": 1}
    assert json.loads(json.dumps(document)) is not None
    text = markdown(document)
    for part in (
        "| touch | 100.0 % | 34.2 % to 100.0 % | 2 |",
        "velocity 3, step 1, in 700",
        "40 ms",
        ": 7\n",
    ):
        assert part in text


def test_latency_plot_writes_every_point(tmp_path: Path, world: World, policy: Path) -> None:
    out = tmp_path / "latency.svg"
    words = ["--policy", str(policy), "--out", str(out), "--episodes", "1", "--inference-ms", "30"]
    words += [
        "--modes",
        "latest",
        "rtc",
        "--latencies-ms",
        "0",
        "200",
        "--kinds",
        "touch",
        "--time-limit",
        "0.2",
    ]
    contract = tmp_path / "own.yaml"
    shipped = (Path(__file__).parents[1] / "config" / "so101.yaml").read_text()
    contract.write_text(shipped.replace("policy_rate: 30.0", "policy_rate: 20.0"))
    words += ["--contract", str(contract)]
    assert latency_plot.main(words) == 0
    root = ElementTree.fromstring(out.read_text())
    assert len(root.findall("{*}circle")) == 4
    assert len(root.findall("{*}polyline")) == 2
    runs = json.loads(out.with_suffix(".json").read_text())
    assert [run["options"]["latency"] for run in runs] == [0.0, 0.2, 0.0, 0.2]
    assert {run["options"]["contract"] for run in runs} == {str(contract)}
    assert "| 200 ms |" in out.with_suffix(".md").read_text()
    assert latency_plot.main(["--policy", str(tmp_path / "none"), "--out", str(out)]) == 1


def test_command_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    words = ["evaluate", "--expert", "--episodes", "2", "--kinds", "touch", "--json", str(path), "--quiet"]
    assert cli(words) == 0
    assert "| touch | 100.0 %" in capsys.readouterr().out
    assert json.loads(path.read_text())["success"]["count"] == 2
    assert cli(["evaluate", "--expert", "--episodes", "0"]) == 2
    assert cli(["evaluate", "--policy", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
