"""A policy ready to run: checkpoint, processors and engine behind one call."""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint, read_checkpoint
from vla_infer.engine import Engine, Program
from vla_infer.errors import CheckpointError, EngineError, ObservationError
from vla_infer.fp8 import policy_scales
from vla_infer.inputs import TapeObservation, fill_beside_frames
from vla_infer.models import FAMILIES
from vla_infer.processors import build_processors
from vla_infer.reference_engine import ReferenceEngine, ReferenceProgram, make_engine
from vla_infer.rtc import Rtc, tape_inputs
from vla_infer.safetensors_io import to_float32
from vla_infer.tape import Tape
from vla_infer.tensor_names import unknown_tensors

Image = npt.NDArray[np.uint8]
AnyProgram = Program | ReferenceProgram

# Prompt lengths that programs are made for: the shortest that holds the prompt runs, never the tokenizer's maximum
# by default. Steps of a third keep what is wasted on padding under a quarter.
BUCKETS = (16, 32, 48, 64, 96, 128, 200)
MAX_IMAGE = (1080, 1920)


@dataclass(frozen=True)
class PolicyInfo:
    """What a policy is. Byte counts are of memory held by the engine; `arena_bytes` is all but the weights."""

    family: str
    device: str
    precision: str
    cameras: tuple[str, ...]
    state_dim: int
    action_dim: int
    horizon: int
    n_action_steps: int
    num_steps: int
    prompt_buckets: tuple[int, ...]
    weight_bytes: int
    arena_bytes: int
    path: str
    fingerprint: str


@dataclass(frozen=True)
class Timing:
    """Seconds of the last call: inputs into staging, the engine, actions to robot units."""

    preprocess: float
    engine: float
    postprocess: float


def prompt_buckets(longest: int) -> tuple[int, ...]:
    """Places for prompt tokens, one tape each, where the tokenizer gives up to `longest`."""
    return (*(b for b in BUCKETS if b < longest), longest)


class Policy:
    """Runs one checkpoint. Make one with `load_policy`.

    Thread-safe: calls from several threads run one after another; the interpreter's lock is free while the engine
    works. What `predict` returns belongs to the caller.
    """

    def __init__(
        self,
        ckpt: Checkpoint,
        *,
        device: str,
        precision: str,
        num_steps: int | None,
        threads: int | None,
        max_image: tuple[int, int],
    ) -> None:
        model = FAMILIES[ckpt.family]
        self._model = model
        self._sizes = model.sizes(ckpt, steps=num_steps)
        self._processors = build_processors(ckpt)
        self._max_image = max_image
        buckets = prompt_buckets(self._processors.max_tokens)
        frame_bytes = max_image[0] * max_image[1] * 3
        tapes = [model.record(self._sizes, prompt=b, frame_bytes=frame_bytes) for b in buckets]
        check_weights(ckpt, tapes[0])

        read = weight_reader(ckpt)
        scales = policy_scales(ckpt, tapes, device=device) if precision == "fp8" else None
        self._engine: Engine | ReferenceEngine | None = make_engine(
            tapes, read, device=device, precision=precision, threads=threads, scales=scales
        )
        self._programs: list[tuple[int, AnyProgram]] = list(zip(buckets, self._engine.programs, strict=True))
        self._lock = threading.Lock()
        self._generator = np.random.default_rng(0)
        self._timing = Timing(0.0, 0.0, 0.0)
        self._info = PolicyInfo(
            family=ckpt.family,
            device=self._engine.device_name,
            precision=precision,
            cameras=ckpt.cameras,
            state_dim=ckpt.state_dim,
            action_dim=ckpt.action_dim,
            horizon=ckpt.horizon,
            n_action_steps=int(ckpt.config["n_action_steps"]),
            num_steps=self._sizes.steps,
            prompt_buckets=buckets,
            weight_bytes=self._engine.weight_bytes,
            arena_bytes=self._engine.arena_bytes,
            path=str(ckpt.path),
            fingerprint=ckpt.fingerprint,
        )

    @property
    def info(self) -> PolicyInfo:
        return self._info

    @property
    def timing(self) -> Timing:
        """Where the last `predict` spent its time."""
        return self._timing

    def seed(self, value: int) -> None:
        """Restart the generator of the noise that `predict` draws when none is given; it starts at 0."""
        with self._lock:
            self._generator = np.random.default_rng(value)

    def picture_memory(self, height: int, width: int) -> Image:
        """An array (height, width, 3) to write a camera's pictures to, zeros, that a GPU reads by itself: `predict` has
        nothing to copy then. The caller's to keep, even after `close`.

        It must not change while `predict` runs, so who receives pictures meanwhile needs two. Pinned memory is
        scarce and slow to get: ask for it once, not for every picture.

        Raises EngineError: the policy is closed, or there is no room.
        """
        with self._lock:
            if self._engine is None:
                raise EngineError("policy: picture_memory() after close()")
            return self._engine.host_memory((height, width, 3))

    def predict(
        self,
        images: Mapping[str, Image],
        state: npt.NDArray[np.floating],
        task: str,
        *,
        noise: npt.NDArray[np.float32] | None = None,
        rtc: Rtc | None = None,
    ) -> npt.NDArray[np.float32]:
        """An action chunk for one observation.

        Args:
            images: uint8 (H, W, 3) RGB of any size up to the one given at load, by camera feature name
                ("observation.images.top"). A camera that is left out is masked, as the model defines; at least
                one must be there.
            state: (state_dim,) in robot units, in the order the policy was trained with.
            task: the instruction.
            noise: (horizon, max_action_dim), the start of denoising; drawn from a normal distribution when None.
            rtc: what the chunk has to continue (real-time chunking); None starts afresh.

        Returns:
            (horizon, action_dim) float32 in robot units. Values are whatever the policy gives: they are not
            checked here for limits, nor for being finite.

        Raises:
            ObservationError: an image, the state, the task, the noise or `rtc` cannot be used; nothing was run.
            EngineError: the policy is closed, or its device failed.
        """
        with self._lock:
            if self._engine is None:
                raise EngineError("policy: predict() after close()")
            start = time.perf_counter()
            raw = np.asarray(state, np.float32)
            encoded = self._processors.encode(raw, task)
            program = self._program(len(encoded.tokens))
            inputs = program.inputs
            pictures = self._images(images)
            program.stage("frames", pictures)
            try:  # meanwhile
                seen = TapeObservation(
                    images=pictures,
                    state=encoded.state,
                    tokens=encoded.tokens,
                    noise=self._noise(inputs["actions"].shape, noise),
                    guide=self._guide(inputs["rtc_previous"].shape, rtc, raw),
                )
                fill_beside_frames(inputs, self._model, self._sizes, seen)
            finally:
                program.settle()
            ready = time.perf_counter()
            program.run()
            ran = time.perf_counter()
            actions = self._processors.decode(program.result("actions"), raw)
            self._timing = Timing(ready - start, ran - ready, time.perf_counter() - ran)
            return actions

    def close(self) -> None:
        """Give the engine's memory back; a call of `predict` that is under way ends first."""
        with self._lock:
            if self._engine is not None:
                self._engine.programs.clear()  # they hold it: its memory would wait for the garbage collector
            self._programs = []
            self._engine = None

    # ----------------------------------------------------------------- inputs
    def _program(self, tokens: int) -> AnyProgram:
        for bucket, program in self._programs:
            if tokens <= bucket:
                return program
        raise ObservationError(f"task: {tokens} tokens, the policy takes {self._programs[-1][0]}")

    def _images(self, images: Mapping[str, Image]) -> list[Image | None]:
        """In the order of the model's cameras, None for one that is left out."""
        renamed = self._renamed(images)
        found = [renamed.get(camera) for camera in self._info.cameras]
        for camera, image in zip(self._info.cameras, found, strict=True):
            if image is not None:
                self._check_image(camera, image)
        return found

    def _noise(
        self, shape: tuple[int, ...], noise: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32]:
        if noise is None:
            return self._generator.standard_normal(shape, np.float32)
        if noise.shape != shape or not np.isfinite(noise).all():
            raise ObservationError(f"noise: expected {shape}, all finite, got {noise.shape}")
        return noise

    def _guide(
        self, shape: tuple[int, ...], rtc: Rtc | None, state: npt.NDArray[np.float32]
    ) -> dict[str, npt.NDArray[np.float32]]:
        if rtc is None:
            return {}
        horizon, width = shape
        previous = rtc.previous
        if not rtc.normalized:
            previous = self._processors.normalize_actions(previous, state)
        return tape_inputs(rtc, previous, horizon=horizon, width=width, steps=self._sizes.steps)

    def _renamed(self, images: Mapping[str, Image]) -> dict[str, Image]:
        names = self._processors.rename_map
        renamed = {names.get(name, name): image for name, image in images.items()}
        cameras = self._info.cameras
        for name in renamed:
            if name not in cameras:
                near = difflib.get_close_matches(name, cameras, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ObservationError(
                    f"images: no camera {name!r} in this policy, it has {', '.join(cameras)}{hint}"
                )
        if not renamed:
            raise ObservationError(f"images: expected at least one of {', '.join(cameras)}, got none")
        return renamed

    def _check_image(self, camera: str, image: Image) -> None:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ObservationError(f"images: {camera}: expected a uint8 array (H, W, 3), got {got}")
        height, width, channels = image.shape
        if channels != 3 or height < 1 or width < 1:
            raise ObservationError(f"images: {camera}: expected (H, W, 3), got {image.shape}")
        most = self._max_image
        if height * width > most[0] * most[1]:
            raise ObservationError(
                f"images: {camera}: {width}x{height} is above the {most[1]}x{most[0]} pixels given at load "
                "(max_image)"
            )


def weight_reader(ckpt: Checkpoint) -> Callable[[str], npt.NDArray[np.generic]]:
    """Reads tensors as the engine takes them: float32, or bfloat16 bits as uint16."""

    def read(name: str) -> npt.NDArray[np.generic]:
        dtype = ckpt.info(name).dtype
        values: npt.NDArray[np.generic] = ckpt.read(name)
        return values if dtype in ("F32", "BF16") else to_float32(values, dtype)

    return read


def check_weights(ckpt: Checkpoint, tape: Tape) -> None:
    """Every tensor that the tape names is there with the shape it expects, and no other that the family does not
    know: a model with more parts would compute something else. Raises CheckpointError."""
    params = {b.name: b.rows * b.cols for b in tape.buffers if b.kind == "param"}
    weights = {w for op in tape.ops for w in op.weights}
    for w in weights:
        shape = ckpt.shape_of(w.name)
        n, k = shape[0], int(np.prod(shape[1:]))
        if n != w.n or (k != w.k if w.cols is None else k < w.cols[1]):
            wide = w.k if w.cols is None else w.cols[1]
            raise CheckpointError(f"{ckpt.path}: {w.name}: expected ({w.n}, {wide}), got {shape}")
    for name, count in params.items():
        shape = ckpt.shape_of(name)
        if int(np.prod(shape)) != count:
            raise CheckpointError(f"{ckpt.path}: {name}: expected {count} values, got shape {shape}")
    unknown = unknown_tensors(ckpt.family, ckpt.tensors, (*params, *(w.name for w in weights)))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{ckpt.path}: {ckpt.family} has no {', '.join(unknown[:3])}{more}: another model than config.json says, "
            "or parts that this version does not have"
        )


def load_policy(
    path: str | Path,
    *,
    device: str = "cpu",
    precision: str = "fp32",
    num_steps: int | None = None,
    threads: int | None = None,
    max_image: tuple[int, int] = MAX_IMAGE,
) -> Policy:
    """Load a LeRobot policy directory (or a hub id that is in the local cache) and make it ready to run.

    Args:
        device: "cpu", "cuda" or "reference" (PyTorch, operation by operation: slow, to compare by).
        precision: "fp32", "bf16" or, on a CPU, "int8": 8-bit integer products with a scale for each output of a
            weight and for each row of activations, bfloat16 in between; or, on a GPU of compute capability 9.0 and
            with device "reference", "fp8": 8-bit floating point in the vision encoder and the prefix, by the scales
            that `vla-infer calibrate` wrote.
        num_steps: denoising steps; None takes what the checkpoint says.
        threads: of the CPU engine, None for one a processor; on a GPU, those that copy pictures to it, None for 3.
        max_image: the largest picture (height, width) that `predict` will be given; only the product matters.

    Raises:
        CheckpointError, UnsupportedError: the directory is not a policy this package runs, or precision "fp8" has no
            scales for it, or stale ones.
        EngineError: the device or the precision cannot be had.
    """
    if num_steps is not None and not 1 <= num_steps <= 1000:
        raise EngineError(f"load_policy: num_steps: expected 1 to 1000, got {num_steps}")
    ckpt = read_checkpoint(path)
    return Policy(
        ckpt, device=device, precision=precision, num_steps=num_steps, threads=threads, max_image=max_image
    )
