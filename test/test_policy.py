"""`Policy.predict` from pictures, state and text to robot units, on the golden policies."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from golden import Golden, relative

import vla_infer
from vla_infer.errors import EngineError, ObservationError
from vla_infer.policy import Policy

TASK = "pick up the red cube"


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("smolvla")


@pytest.fixture(scope="module")
def policy(golden: Golden) -> Policy:
    return vla_infer.load_policy(golden.path)


def observe(golden: Golden) -> tuple[dict[str, npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    return golden.images(), golden["raw_state"]


def test_robot_actions(policy: Policy, golden: Golden) -> None:
    images, state = observe(golden)
    actions = policy.predict(images, state, golden.task, noise=golden["noise"][0])
    assert actions.dtype == np.float32
    assert relative(actions, golden["robot_actions"][0]) <= 1e-4


def test_noise_is_seeded(policy: Policy, golden: Golden) -> None:
    images, state = observe(golden)
    policy.seed(7)
    first = [policy.predict(images, state, TASK) for _ in range(2)]
    policy.seed(7)
    again = [policy.predict(images, state, TASK) for _ in range(2)]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])


def test_same_input_same_bits(policy: Policy, golden: Golden) -> None:
    images, state = observe(golden)
    noise = golden["noise"][0]
    first = policy.predict(images, state, TASK, noise=noise)
    for task in ("a much longer instruction that needs a bucket of its own, surely", TASK):
        last = policy.predict(images, state, task, noise=noise)
    np.testing.assert_array_equal(first, last)


def test_bucket_does_not_change_the_result(golden: Golden) -> None:
    """The same prompt in a longer bucket, with padding that is not seen, gives the same actions."""
    images, state = observe(golden)
    policy = vla_infer.load_policy(golden.path)
    results = []
    while policy._programs:
        results.append(policy.predict(images, state, golden.task, noise=golden["noise"][0]))
        policy._programs.pop(0)
    assert len(results) == len(policy.info.prompt_buckets)
    for result in results[1:]:
        assert relative(result, results[0]) < 1e-5


def test_a_masked_camera_is_not_seen(policy: Policy, golden: Golden) -> None:
    images, state = observe(golden)
    noise = golden["noise"][0]
    both = policy.predict(images, state, TASK, noise=noise)
    top = {policy.info.cameras[0]: images[policy.info.cameras[0]]}
    one = policy.predict(top, state, TASK, noise=noise)
    assert relative(one, both) > 1e-3


def test_strided_and_larger_images(policy: Policy, golden: Golden) -> None:
    """A picture cut out of a larger one is what its copy is; the size may change from call to call."""
    _, state = observe(golden)
    noise = golden["noise"][0]
    big = np.random.default_rng(0).integers(0, 256, (480, 700, 3), dtype=np.uint8)
    cut = big[:, 30:670]
    first = policy.predict({policy.info.cameras[0]: cut}, state, TASK, noise=noise)
    second = policy.predict({policy.info.cameras[0]: cut.copy()}, state, TASK, noise=noise)
    np.testing.assert_array_equal(first, second)


def test_pictures_in_picture_memory(policy: Policy, golden: Golden) -> None:
    images, state = observe(golden)
    noise = golden["noise"][0]
    pictures = {}
    for camera, picture in images.items():
        pictures[camera] = place = policy.picture_memory(*picture.shape[:2])
        assert place.shape == picture.shape
        assert place.dtype == np.uint8
        assert not place.any()
        place[...] = picture
    want = policy.predict(images, state, TASK, noise=noise)
    np.testing.assert_array_equal(policy.predict(pictures, state, TASK, noise=noise), want)


def test_threads_take_turns(policy: Policy, golden: Golden) -> None:
    images, state = observe(golden)
    noises = np.random.default_rng(1).standard_normal((4, *golden["noise"][0].shape)).astype(np.float32)
    want = [policy.predict(images, state, TASK, noise=n) for n in noises]
    got: list[npt.NDArray[np.float32] | None] = [None] * len(noises)

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = policy.predict(images, state, TASK, noise=noises[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(noises))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {}}, "at least one of observation.images.top"),
        ({"images": {"observation.images.tpo": 0}}, "did you mean 'observation.images.top'"),
        ({"images": {"observation.images.top": np.zeros((4, 4, 3))}}, "expected a uint8 array"),
        ({"images": {"observation.images.top": np.zeros((4, 4, 1), np.uint8)}}, r"expected \(H, W, 3\)"),
        ({"images": {"observation.images.top": np.zeros((3000, 1000, 3), np.uint8)}}, "max_image"),
        ({"state": np.zeros(5)}, "state"),
        ({"state": np.full(6, np.nan)}, "finite"),
        ({"task": 7}, "instruction|task"),
        ({"noise": np.zeros((2, 2), np.float32)}, "noise: expected"),
        ({"noise": np.full((10, 32), np.inf, np.float32)}, "all finite"),
    ],
)
def test_bad_observation(policy: Policy, golden: Golden, change: dict[str, object], message: str) -> None:
    images, state = observe(golden)
    call: dict[str, object] = {"images": images, "state": state, "task": TASK, "noise": None} | change
    with pytest.raises(ObservationError, match=message):
        policy.predict(call["images"], call["state"], call["task"], noise=call["noise"])  # type: ignore[arg-type]
    assert np.isfinite(policy.predict(images, state, TASK)).all()


def test_closed(golden: Golden) -> None:
    policy = vla_infer.load_policy(golden.path)
    policy.close()
    images, state = observe(golden)
    with pytest.raises(EngineError, match="after close"):
        policy.predict(images, state, TASK)
    with pytest.raises(EngineError, match="after close"):
        policy.picture_memory(4, 4)


def test_closing_gives_the_memory_back_at_once(golden: Golden) -> None:
    """Without the garbage collector, which the node keeps from what was loaded."""
    policy = vla_infer.load_policy(golden.path)
    engine = weakref.ref(policy._engine)
    gc.disable()
    try:
        policy.close()
        assert engine() is None
    finally:
        gc.enable()


def test_cuda_is_refused_in_one_line_where_it_is_not(golden: Golden) -> None:
    from vla_infer import _engine

    if _engine.built_with_cuda():
        pytest.skip("this build has the CUDA executor")
    with pytest.raises(EngineError, match="no CUDA executor; use device 'cpu'"):
        vla_infer.load_policy(golden.path, device="cuda")


def test_fewer_steps(golden: Golden) -> None:
    """With one step the actions are noise minus the velocity at time 1, in the model's units."""
    policy = vla_infer.load_policy(golden.path, num_steps=1)
    images, state = observe(golden)
    noise = golden["noise"][0]
    actions = policy.predict(images, state, golden.task, noise=noise)
    want = policy._processors.decode(noise - golden["velocity_step0"][0], state)
    assert relative(actions, want) <= 1e-4


def test_path_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(vla_infer.policy.CheckpointError, match=r"config\.json|no such"):
        vla_infer.load_policy(tmp_path)
