"""Training on the tape: batches, gradients, saving, going on; on a policy that is small and made-up demonstrations."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch")

from golden import relative  # noqa: E402

from vla_infer.errors import TrainingError  # noqa: E402
from vla_infer.models import smolvla  # noqa: E402
from vla_infer.policy import load_policy  # noqa: E402
from vla_infer.random_weights import Decoder, Sizes, Vision  # noqa: E402
from vla_infer.reference import ReferenceExecutor  # noqa: E402
from vla_infer.sim.tasks import COLOURS, KINDS, phrases  # noqa: E402
from vla_infer.training.__main__ import main as training  # noqa: E402
from vla_infer.training.batches import Batches, places  # noqa: E402
from vla_infer.training.loop import Plan, Trainer  # noqa: E402
from vla_infer.training.objective import (  # noqa: E402
    PLACES,
    TIME_STEPS,
    Batch,
    Objective,
    initial_parameters,
)
from vla_infer.training.policy_directory import write_small_files, write_weights  # noqa: E402
from vla_infer.training.presets import Preset  # noqa: E402
from vla_infer.training.shards import (  # noqa: E402
    Demonstrations,
    Recipe,
    load_demonstrations,
    prepare,
    write_shard,
)

torch.set_num_threads(1)  # tensors this small only wait for more threads

CAMERAS = ("observation.images.top", "observation.images.wrist")
MICRO = Preset(
    "micro",
    Sizes(
        Vision(64, 1, 1, 64, 4, 16),
        Decoder(64, 2, 64, 1, 1, 64),
        Decoder(64, 2, 64, 1, 1, 64),
        512,
        4,
        scale_factor=2,
    ),
    denoising=2,
)


def demonstrations(count: int = 24) -> Demonstrations:
    """Made up, and learnable: what is done is where the state is, moved by the colour."""
    rng = np.random.default_rng(3)
    colour = rng.integers(0, len(COLOURS), count).astype(np.int8)
    state = rng.normal(0, 20, (count, 6)).astype(np.float32)
    cubes = rng.uniform(-0.2, 0.2, (count, len(COLOURS), 3)).astype(np.float32)
    cubes[np.arange(count), (colour + 1) % len(COLOURS)] = np.nan
    rows = {
        "state": state,
        "actions": np.repeat(state[:, None] + 10 * colour[:, None, None], 4, 1).astype(np.float32),
        "valid": np.arange(4) < rng.integers(2, 5, (count, 1)),
        "cubes": cubes,
        "places": rng.uniform(-0.1, 1.1, (count, len(COLOURS), 2)).astype(np.float32),
        "kind": np.zeros(count, np.int8),
        "colour": colour,
        "episode": np.arange(count),
    }
    frames = rng.integers(0, 256, (count, 2, 16, 16, 3), np.uint8)
    return Demonstrations(Recipe(16, 4, ("touch",), CAMERAS), [frames[:7], frames[7:]], rows, 2)


class Setup:
    """A policy under training, with everything that belongs to it."""

    def __init__(self, root: Path, *, precision: str = "fp32", plan: Plan | None = None) -> None:
        self.root = root
        self.data = demonstrations()
        said = [text for kind in KINDS for colour in COLOURS for text in phrases(kind, colour)]
        self.ckpt, self.processors = write_small_files(root, MICRO, self.data, said)
        self.sizes = smolvla.sizes(self.ckpt)
        shapes = {name: info.shape for name, info in self.ckpt.tensors.items()}
        self.parameters = initial_parameters(shapes, self.sizes, 6, seed=1)
        if precision == "fp64":
            self.parameters = {name: value.double() for name, value in self.parameters.items()}
        self.objective = Objective(self.sizes, self.parameters, precision=precision)
        self.trainer = Trainer(plan or Plan(40, 8, rate=3e-3, warmup=5), self.objective, self.parameters)
        self.batches = Batches(self.data, self.processors, self.sizes, device="cpu", seed=5)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "policy")


def pick(batch: Batch, i: int) -> Batch:
    return Batch(**{name: value[i : i + 1] for name, value in vars(batch).items()})


def test_batch_equals_single_runs(setup: Setup) -> None:
    batch = setup.batches.draw(3)
    noise, times = setup.objective.draw(batch, 2, setup.batches.generator)
    together = setup.objective.velocity(setup.parameters, batch, noise, times)
    assert together.shape == (2, 3, 4, 6)
    for k in range(2):
        for i in range(3):
            alone = setup.objective.velocity(
                setup.parameters, pick(batch, i), noise[k : k + 1, i : i + 1], times[k : k + 1, i : i + 1]
            )
            assert relative(together[k, i].numpy(), alone[0, 0].numpy()) < 1e-5


def test_velocity_is_what_the_inference_tape_has(setup: Setup) -> None:
    """At the times of the Euler steps the training tape's velocity takes noise where the model's own loop does."""
    batch = pick(setup.batches.draw(1), 0)
    s = setup.sizes
    length = int(batch.lengths[0])
    tape = smolvla.record(s, prompt=length, frame_bytes=16 * 16 * 3)
    executor = ReferenceExecutor(tape, lambda name: setup.parameters[name].numpy())
    noise = np.random.default_rng(0).standard_normal((s.horizon, s.action_dim)).astype(np.float32)
    state = np.zeros((1, s.state_dim), np.float32)
    state[0, :6] = batch.state[0]
    got = executor.run(
        {
            "frames": batch.frames[0].numpy().reshape(2, -1),
            "geometry": np.array([s.vision.geometry(16, 16, 48)] * 2, np.int32),
            "tokens": batch.tokens[0, :length, None].numpy().astype(np.int32),
            "state": state,
            "actions": noise,
            "rtc_previous": np.zeros_like(noise),
            "rtc_weight": np.zeros((s.horizon, 1), np.float32),
            "rtc_gain": np.zeros((s.steps, 1), np.float32),
            **smolvla.index_inputs(s, prompt=length, tokens=length, present=(True, True)),
        }
    )["actions"][:, :6]
    x = torch.from_numpy(noise[:, :6]).reshape(1, 1, s.horizon, 6)
    for step in range(s.steps):
        times = torch.tensor([[TIME_STEPS - step * TIME_STEPS // s.steps]])
        x = x - setup.objective.velocity(setup.parameters, batch, x, times) / s.steps
    assert relative(x[0, 0].numpy(), got) < 1e-5


def test_gradient_against_finite_differences(tmp_path: Path) -> None:
    setup = Setup(tmp_path, precision="fp64")
    torch.manual_seed(0)
    parameters = {
        name: (value + 0.02 * torch.randn_like(value)).requires_grad_()
        for name, value in setup.parameters.items()
    }
    batch = setup.batches.draw(2)
    noise, times = setup.objective.draw(batch, 1, setup.batches.generator)

    def loss() -> torch.Tensor:
        return setup.objective.losses(parameters, batch, noise.double(), times, goal_weight=0.5).total

    loss().backward()
    # One of each kind: what only the last operations use would pass with a broken start.
    names = [next(n for n in parameters if part in n) for part in ("patch_embedding.weight", "embed_tokens")]
    names += [n for n in parameters if "layers.0" in n and n.endswith(("q_proj.weight", "down_proj.weight"))]
    names += ["model.action_time_mlp_in.weight", "model.state_proj.weight", "model.action_out_proj.bias"]
    names += ["goal.weight", "goal.query", "goal.mark"]
    for name in names:
        value = parameters[name]
        direction = torch.randn_like(value)
        slope = float((value.grad * direction).sum())
        with torch.no_grad():
            value += 1e-5 * direction
            high = float(loss())
            value -= 2e-5 * direction
            low = float(loss())
            value += 1e-5 * direction
        assert (high - low) / 2e-5 == pytest.approx(slope, rel=1e-4, abs=1e-8), name


def test_the_velocity_from_actions_to_noise_has_no_loss(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes from noise at time 1 by -velocity: what is learnt has to lead it to the actions at time 0."""
    batch = setup.batches.draw(3)
    noise, times = setup.objective.draw(batch, 2, setup.batches.generator)
    values = torch.zeros(3, 4 * 2 + PLACES + 1, 64)

    def perfect(
        _: object, batch: Batch, noisy: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        t = times[..., None, None] / TIME_STEPS
        velocity = noise - batch.actions
        assert torch.allclose(noisy - t * velocity, batch.actions.expand_as(noisy), atol=1e-5)
        assert torch.allclose(noisy + (1 - t) * velocity, noise, atol=1e-5)
        return velocity, values

    monkeypatch.setattr(setup.objective, "_run", perfect)
    losses = setup.objective.losses(setup.parameters, batch, noise, times, goal_weight=1.0)
    assert float(losses.flow) == 0.0
    # A readout of nothing: the cube's distance from the origin, and a blind guess among the tokens.
    assert float(losses.goal) == pytest.approx(float((10 * batch.goal).square().mean()), rel=1e-5)
    assert float(losses.pointing) == pytest.approx(np.log(4), rel=1e-5)


def test_times_are_those_of_smolvla(setup: Setup) -> None:
    """0.001 + 0.999 Beta(1.5, 1): its mean is 0.6, and a quarter is below 0.25^(2/3) = 0.397."""
    batch = setup.batches.draw(8)
    _, times = setup.objective.draw(batch, 1000, setup.batches.generator)
    assert int(times.min()) >= 1
    assert int(times.max()) <= TIME_STEPS
    assert float(times.float().mean()) / TIME_STEPS == pytest.approx(0.6, abs=0.02)
    assert float((times < 397).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_rows_beyond_the_episode_do_not_count(setup: Setup) -> None:
    batch = setup.batches.draw(4)
    noise, times = setup.objective.draw(batch, 1, setup.batches.generator)
    wrong = batch.actions + 5.0 * ~batch.valid[..., None]

    def flow(actions: torch.Tensor) -> float:
        changed = replace(batch, actions=actions, valid=batch.valid)
        # Noise in place of what is wrong: the rows see each other, and only the loss is to leave them out.
        t = times.float()[..., None, None] / TIME_STEPS
        same = noise + (1 - t) / t * (batch.actions - actions)
        return float(setup.objective.losses(setup.parameters, changed, same, times, goal_weight=0.0).flow)

    assert not batch.valid.all()
    assert flow(wrong) == pytest.approx(flow(batch.actions), rel=1e-5)


def test_thirty_steps_lower_the_loss(setup: Setup) -> None:
    one = setup.batches.draw(8)
    setup.batches.draw = lambda size: one  # type: ignore[method-assign]
    losses = [setup.trainer.advance(setup.batches) for _ in range(30)]
    first, last = torch.stack(losses[:5]).mean(0), torch.stack(losses[-5:]).mean(0)
    assert (last < 0.7 * first).all(), (first, last)


def test_places_are_image_tokens_row_by_row() -> None:
    at = np.array([[0.1, 0.1], [0.9, 0.1], [0.1, 0.6], [0.5, 0.5], [1.0, 0.5], [-0.1, 0.5], [np.nan, np.nan]])
    assert places(at.astype(np.float32), (2, 3)).tolist() == [0, 2, 3, 4, -1, -1, -1]


def test_other_cubes_are_asked_for_and_not_imitated(setup: Setup) -> None:
    """Where the words name another cube than the one that was gone to, only the cube's place is learnt."""
    rows = setup.data.rows
    batch = setup.batches.draw(400)
    state = torch.tensor(rows["cubes"]).flatten(0, 1)
    other = 0
    for i in range(len(batch.goal)):
        which = int((state - batch.goal[i]).abs().sum(-1).nan_to_num(9.0).argmin())
        observation, colour = divmod(which, len(COLOURS))
        said = colour == rows["colour"][observation]
        assert batch.valid[i].tolist() == (rows["valid"][observation] & said).tolist()
        assert int(batch.token[i]) == int(places(rows["places"][observation, colour], (2, 2)))
        other += not said
    assert 40 < other < 120  # 0.3 of 400, less those whose random cube is the one


def test_padding_has_no_say(setup: Setup) -> None:
    """What is in the action columns beyond the robot's does not change the robot's, before and after training."""
    for _ in range(3):
        setup.trainer.advance(setup.batches)
    trained = setup.trainer.parameters
    assert not trained["model.action_in_proj.weight"][:, 6:].any()
    assert not trained["model.action_out_proj.weight"][6:].any()
    assert not trained["model.state_proj.weight"][:, 6:].any()


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_saved_policy_loads_and_devices_agree(setup: Setup, device: str) -> None:
    for _ in range(5):
        setup.trainer.advance(setup.batches)
    write_weights(setup.root, setup.trainer.average)
    rng = np.random.default_rng(1)
    images = {camera: rng.integers(0, 256, (16, 16, 3), np.uint8) for camera in CAMERAS}
    noise = rng.standard_normal((4, 32)).astype(np.float32)
    arguments = (images, np.full(6, 3.0), "touch the red cube")
    reference = load_policy(setup.root, device="reference", max_image=(16, 16))
    want = reference.predict(*arguments, noise=noise)
    if device == "cpu":
        policy = load_policy(setup.root, device="cpu", threads=1, max_image=(16, 16))
        assert relative(policy.predict(*arguments, noise=noise), want) < 1e-4
        return
    # the same by the training tape, whose parameters are not rounded to bfloat16
    assert reference.info.num_steps == MICRO.denoising
    assert np.isfinite(want).all()
    assert want.shape == (4, 6)


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    straight, first, second = (Setup(tmp_path / name) for name in "abc")
    for _ in range(6):
        straight.trainer.advance(straight.batches)
    for _ in range(3):
        first.trainer.advance(first.batches)
    first.trainer.save(tmp_path / "state", first.batches)
    second.trainer.load(tmp_path / "state", second.batches)
    for _ in range(3):
        second.trainer.advance(second.batches)
    for name, value in straight.trainer.average.items():
        assert torch.equal(value, second.trainer.average[name]), name
    other = Setup(tmp_path / "d", plan=Plan(41, 8))
    with pytest.raises(TrainingError, match="another plan"):
        other.trainer.load(tmp_path / "state", other.batches)
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(TrainingError, match="not a training state"):
        second.trainer.load(tmp_path / "state", second.batches)


def test_saved_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --save-minutes the policy on disk is whole, and a state beside it, before training has ended."""
    data = demonstrations()
    prepare(tmp_path / "data", data.recipe)
    write_shard(tmp_path / "data", 0, np.concatenate(data.frames), data.rows)
    monkeypatch.setattr("vla_infer.training.__main__.PRESETS", {"micro": MICRO})
    policy, steps = tmp_path / "policy", []
    save = Trainer.save

    def saved(self: Trainer, path: Path, batches: Batches) -> None:
        if steps:  # what the one before left
            record = json.loads((policy / "training.json").read_text())
            assert (record["steps"], record["finished"]) == (steps[-1], False)
            load_policy(policy, device="reference", max_image=(16, 16)).close()
        steps.append(self.step)
        save(self, path, batches)

    monkeypatch.setattr(Trainer, "save", saved)
    words = [
        "train",
        str(tmp_path / "data"),
        str(policy),
        "--preset",
        "micro",
        "--steps",
        "4",
        "--batch",
        "4",
    ]
    words += ["--save-minutes", "0"]
    assert training([*words, "--call-minutes", "0"]) == 3
    assert training(words) == 0
    assert steps == [1, 2, 3, 4]
    assert json.loads((policy / "training.json").read_text())["finished"]


def test_shares_make_every_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from vla_infer.training import demonstrate

    made: list[int] = []

    def make(folder: Path, recipe: Recipe, shard: int) -> demonstrate.Progress:
        made.append(shard)
        return demonstrate.Progress(done=1)

    monkeypatch.setattr(demonstrate, "_make_shard", make)
    monkeypatch.setattr(
        demonstrate, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count)
    )
    recipe = demonstrations().recipe
    for part, count in ((0, 3), (1, 2)):
        total = demonstrate.make_demonstrations(tmp_path, recipe, episodes=125, workers=2, share=(part, 2))
        assert (total.done, total.shards) == (count, count)
    assert sorted(made) == [0, 1, 2, 3, 4]
    with pytest.raises(SystemExit):
        training(["demonstrate", str(tmp_path), "--share", "2/2"])


def test_shards_come_back_and_belong_to_one_recipe(tmp_path: Path) -> None:
    data = demonstrations()
    with pytest.raises(TrainingError, match="recipe"):
        load_demonstrations(tmp_path)
    prepare(tmp_path, data.recipe)
    with pytest.raises(TrainingError, match="no complete shard"):
        load_demonstrations(tmp_path)
    parts = ((0, slice(0, 7)), (1, slice(7, None)))
    for (shard, part), frames in zip(parts, data.frames, strict=True):
        write_shard(tmp_path, shard, frames, {name: values[part] for name, values in data.rows.items()})
    (tmp_path / "00002.npy").write_bytes(b"a shard that was cut short has no rows")
    back = load_demonstrations(tmp_path)
    assert back.recipe == data.recipe
    assert all(np.array_equal(back.rows[name], data.rows[name], equal_nan=True) for name in data.rows)
    assert np.array_equal(np.concatenate(back.frames), np.concatenate(data.frames))
    with pytest.raises(TrainingError, match="another recipe"):
        prepare(tmp_path, replace(data.recipe, stride=3))


def test_model_card_states_what_was_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "grasper"
    policy.mkdir()
    assert training(["card", str(policy)]) == 1
    assert "training.json" in capsys.readouterr().err
    plan = {"batch": 8, "draws": 4, "seed": 7, "rate": 0.001, "warmup": 5}
    made = {
        "preset": asdict(MICRO),
        "parameters": 1_234_567,
        "weight_bytes": 2_500_000,
        "demonstrations": {"episodes": 11, "observations": 222, "kinds": ["touch"], "seed": 3},
        "plan": plan,
        "precision": "bf16",
        "steps": 40,
        "finished": False,
        "seconds": 90.0,
        "device": "a processor",
        "torch": "2",
        "history": [{"flow": 0.5, "goal": 0.25, "pointing": 1.5}],
    }
    (policy / "training.json").write_text(json.dumps(made))
    rate = {"rate": 0.9, "low": 0.8, "high": 0.95, "of": 50}
    how = {"device": "cpu", "precision": "fp32", "scheduler": None, "policy": "x"}
    how |= {"inference": 0.04, "latency": 0.1, "wrong_instruction": True}
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"options": how, "by_kind": {"touch": rate}, "success": rate}))
    assert training(["card", str(policy), str(result)]) == 0
    card = capsys.readouterr().out
    for part in (
        "1.23 million, 2.5 MB",
        "11 episodes, 222",
        "40 steps of 8 x 4 draws (stopped",
        "1.5 minutes",
    ):
        assert part in card
    assert "| another cube's | contract | 140 ms | touch | 90.0 % | 80.0 to 95.0 % | 50 |" in card
    assert "| all |" not in card  # of one kind it would say the same again
    result.write_text(json.dumps({"options": how, "by_kind": {"touch": rate, "pick": rate}, "success": rate}))
    assert training(["card", str(policy), str(result)]) == 0
    assert "| 140 ms | all | 90.0 % |" in capsys.readouterr().out


def test_every_instruction_fits_the_training_prompt(setup: Setup) -> None:
    for kind in KINDS:
        for colour in COLOURS:
            for text in (*phrases(kind, colour), *phrases(kind, colour, "eval")):
                assert len(setup.processors.encode(np.zeros(6), text).tokens) <= PLACES
