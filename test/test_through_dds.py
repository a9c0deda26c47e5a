"""Episodes through ROS: what a listener makes of what it hears, and of what it does not."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mujoco", reason="the simulation needs mujoco")
pytest.importorskip("rclpy", reason="the nodes need ROS 2")

from test_evaluate import options, policy, world  # noqa: F401 (two fixtures)

from vla_infer.cli import main as cli
from vla_infer.contract import load_contract
from vla_infer.errors import ReplayError
from vla_infer.sim import through_dds
from vla_infer.sim.evaluate import Options, evaluate
from vla_infer.sim.world import World


class Ears:
    """In the place of a listener's node: subscribes to nothing."""

    def create_subscription(self, *_: object) -> None:
        pass


def listener(seeds: range) -> Any:
    """One that has heard /clock and the joints."""
    made = through_dds._Listener(Ears(), load_contract("so101"), seeds)
    made.on_clock(SimpleNamespace(clock=SimpleNamespace(sec=5, nanosec=0)))
    made.on_joints(SimpleNamespace(position=[0.0] * 6))
    return made


def say(ears: Any, *phases: str) -> None:
    """Statuses as "seed phase"."""
    for text in phases:
        seed, phase = text.split()
        values = {"seed": seed, "phase": phase, "success": "true", "kind": "touch", "instruction": "go"}
        items = [SimpleNamespace(key=key, value=value) for key, value in values.items()]
        ears.on_status(SimpleNamespace(values=items))


def test_what_is_heard_becomes_outcomes_in_the_order_of_the_seeds() -> None:
    ears = listener(range(4, 6))
    assert not ears.connected
    assert ears.waits_for == "anything on simulation/status"
    say(ears, "4 waiting")
    assert ears.connected
    assert ears.waits_for == "the begin of episode 4"
    say(ears, "4 pause", "4 running", "4 running")
    assert ears.waits_for == "the end of episode 4"
    ears.on_clock(SimpleNamespace(clock=SimpleNamespace(sec=6, nanosec=500_000_000)))
    say(ears, "4 ended", "4 ended", "5 pause", "5 running", "5 ended", "6 pause", "6 running")
    assert not ears.problem
    assert [(outcome.seed, outcome.seconds, outcome.success) for outcome in ears.outcomes] == [
        (4, 1.5, True),
        (5, 0.0, True),
    ]


@pytest.mark.parametrize(
    ("phases", "line"),
    [
        (["4 ended"], "waited for the begin of episode 4, got episode 4 ended"),
        (["5 pause"], "waited for the begin of episode 4, got episode 5 pause"),
        (["4 running", "5 pause"], "waited for the end of episode 4, got episode 5 pause"),
        (["4 running", "4 ended", "5 ended"], "waited for the begin of episode 5, got episode 5 ended"),
        (["4 running", "4 ended", "6 pause"], "waited for the begin of episode 5, got episode 6 pause"),
        (["3 ended"], "waited for the begin of episode 4, got episode 3 ended"),
    ],
)
def test_an_episode_that_was_missed_is_not_waited_for(phases: list[str], line: str) -> None:
    """The simulation goes on for ever: whoever waits for what is over would do so too."""
    ears = listener(range(4, 6))
    say(ears, *phases)
    assert line in ears.problem
    assert "\n" not in ears.problem


@pytest.mark.parametrize(
    ("simulation", "line"),
    [
        (
            "import time; time.sleep(600)",
            "waited 1 s for anything on /clock, joint_states, simulation/status",
        ),
        ("raise SystemExit(3)", "the simulation ended with status 3 before its time"),
    ],
)
def test_a_simulation_that_is_not_heard_is_an_error(
    policy: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    simulation: str,
    line: str,
) -> None:
    monkeypatch.setattr(through_dds, "START_LIMIT", 1.0 if "sleep" in simulation else 60.0)
    monkeypatch.setattr(through_dds, "_SLOWEST", 0.1)
    commands = (sys.executable, "-c", simulation), (sys.executable, "-c", "raise SystemExit('started')")
    monkeypatch.setattr(through_dds, "_commands", lambda *_: commands)
    with pytest.raises(ReplayError, match=re.escape(line)):
        through_dds.evaluate_through_dds(Options(str(policy), 1, time_limit=1.0), progress=lambda _: None)


def test_through_dds_the_scenes_are_the_same(
    world: World,  # noqa: F811
    policy: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["evaluate", "--policy", str(policy), "--through-dds", "--episodes", "1", "--seed", "4"]
    assert cli([*words, "--latency-ms", "50"]) == 1
    assert "--latency-ms" in capsys.readouterr().err
    assert cli([*words, "--kinds", "touch", "--time-limit", "1", "--scheduler", "rtc", "--threads", "1"]) == 0
    there = capsys.readouterr()
    here = evaluate(options(policy, seed=4, kinds=("touch",), time_limit=0.1))
    assert f"seed 4: {here.outcomes[0].said}" in there.err
    assert "scheduler rtc, an inference takes what it takes" in there.out
