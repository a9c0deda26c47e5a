"""Scales for precision "fp8" out of observations, and what fp8 costs on them, on the reference executor.

Calibration sees the first three quarters of the observations in their order; the last quarter is held out, so that in
a recording it is another stretch of time, and in a dataset other episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint
from vla_infer.errors import EngineError, ObservationError
from vla_infer.fp8 import (
    HEADROOM,
    Errors,
    Scales,
    hash_tape,
    hash_weights,
    in_fp8,
    key,
    named,
    products,
    scale_of,
    weight_files,
)
from vla_infer.inputs import Arrays, TapeObservation, empty_inputs, fill_inputs
from vla_infer.models import BF16_IN_FP8, FAMILIES
from vla_infer.models.layers import UNSEEN
from vla_infer.policy import check_weights, prompt_buckets, weight_reader
from vla_infer.processors import Encoded, build_processors
from vla_infer.reference_engine import import_reference
from vla_infer.tape import Op, Tape

if TYPE_CHECKING:
    from torch import Tensor as Torch

    from vla_infer.observations import Observation
    from vla_infer.reference import ReferenceExecutor

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Actions:
    """What came out for one observation: model (H, action_dim) in model units, the columns that a robot gets; noise,
    the same columns of what denoising started from; robot (H, action_dim) in robot units."""

    model: Array
    noise: Array
    robot: Array


def errors_of(pairs: Sequence[tuple[Actions, Actions]]) -> Errors:
    """How far the second of each pair, fp8, is from the first, bfloat16."""
    cosines = [_cosine(a.model, b.model) for a, b in pairs]
    added = [_cosine(a.model - a.noise, b.model - b.noise) for a, b in pairs]
    relative = [float(np.linalg.norm(b.model - a.model) / np.linalg.norm(a.model)) for a, b in pairs]
    return Errors(
        cosine=min(cosines),
        cosine_median=float(np.median(cosines)),
        cosine_added=min(added),
        relative_l2=max(relative),
        relative_l2_median=float(np.median(relative)),
        action_difference=max(float(np.abs(b.robot - a.robot).max()) for a, b in pairs),
    )


def _cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


class Magnitudes:
    """The largest magnitude of the left operand of each product of a tape that could be in fp8, by its key.
    `observe` is for `ReferenceExecutor.observe`; it raises EngineError for an operand that is not finite."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.largest = dict.fromkeys(products(tape), 0.0)

    def observe(self, op: Op, x: Torch) -> None:
        if in_fp8(op):
            self.add(op, float(x.abs().amax()))

    def add(self, op: Op, value: float) -> None:
        """The largest magnitude of a run."""
        if not np.isfinite(value):
            raise EngineError(f"calibrate: {key(op)}: its left operand is not finite")
        self.largest[key(op)] = max(self.largest[key(op)], value)

    def scales(self, *, samples: int, headroom: float = HEADROOM) -> Scales:
        """Scales of what was seen. Their errors are not measured and no weights are named: not to be written."""
        activations = {name: float(scale_of(headroom * value)) for name, value in self.largest.items()}
        return Scales(
            activations, (), "0" * 64, hash_tape(self.tape), samples, 0, Errors(1, 1, 1, 0, 0, 0), None
        )


class Calibration:
    """Scales for one policy out of observations, and the errors that they leave, on what runs them: `Runner` or
    `EngineRunner`. Raises ObservationError for an observation that the policy cannot take."""

    def __init__(self, ckpt: Checkpoint, observations: Sequence[Observation]) -> None:
        self.ckpt = ckpt
        self.observations = list(observations)
        self._model = FAMILIES[ckpt.family]
        self._sizes = self._model.sizes(ckpt)
        self._processors = build_processors(ckpt)
        self._frame_bytes = max(image.size for o in observations for image in o.images.values())
        self.tape = self._tape(self._processors.max_tokens)
        check_weights(ckpt, self.tape)
        self._bf16 = named(self.tape, BF16_IN_FP8.get(ckpt.family, ()))
        self._plain: dict[int, Actions] = {}
        # called before each run; what it raises ends a calibration
        self.proceed: Callable[[], object] = lambda: None

    def close(self) -> None:
        """Give back what the device holds; not needed for anything else."""

    def _tape(self, prompt: int) -> Tape:
        recorded: Tape = self._model.record(self._sizes, prompt=prompt, frame_bytes=self._frame_bytes)
        return recorded

    def _encoded(self, index: int) -> Encoded:
        o = self.observations[index]
        return self._processors.encode(np.asarray(o.state, np.float32), o.task)

    def _inputs(self, index: int, tape: Tape, encoded: Encoded) -> Arrays:
        """An observation in the inputs of a tape, with the same noise every time."""
        self.proceed()
        o = self.observations[index]
        inputs = empty_inputs(tape)
        noise = np.random.default_rng([0, index]).standard_normal(inputs["actions"].shape, np.float32)
        names = self._processors.rename_map
        images = {names.get(name, name): image for name, image in o.images.items()}
        if not set(images) & set(self.ckpt.cameras):
            raise ObservationError(
                f"images: expected one of {', '.join(self.ckpt.cameras)}, got {', '.join(images)}"
            )
        seen = TapeObservation(
            [images.get(camera) for camera in self.ckpt.cameras], encoded.state, encoded.tokens, noise
        )
        fill_inputs(inputs, self._model, self._sizes, seen)
        return inputs

    def _actions(self, index: int, model: npt.NDArray[np.float32], noise: npt.NDArray[Any]) -> Actions:
        """What came out for an observation, from `noise`."""
        if not np.isfinite(model).all():
            raise EngineError(f"calibrate: observation {index}: the policy's actions are not finite")
        robot = self._processors.decode(model, np.asarray(self.observations[index].state, np.float32))
        columns = slice(self.ckpt.action_dim)
        return Actions(model[:, columns].astype(float), noise[:, columns].astype(float), robot.astype(float))

    def run(self, index: int, scales: Scales | None = None) -> Actions:
        """The actions of an observation, from the same noise whatever `scales` are; None for bfloat16."""
        raise NotImplementedError

    def magnitudes(self, indices: Sequence[int]) -> Magnitudes:
        """Of some observations, of the rows that some query sees."""
        raise NotImplementedError

    def plain(self, index: int) -> Actions:
        """The actions of an observation in bfloat16, computed once."""
        if index not in self._plain:
            self._plain[index] = self.run(index)
        return self._plain[index]

    def errors(self, indices: Sequence[int], scales: Scales) -> Errors:
        """How far fp8 with these scales is from bfloat16 on some observations."""
        return errors_of([(self.plain(i), self.run(i, scales)) for i in indices])

    def calibrate(self, *, kept: Sequence[str] = ()) -> Scales:
        """Scales from the observations, and the errors they leave. kept: keys of what stays in bfloat16, beside what
        does in every policy of the family (`BF16_IN_FP8`)."""
        seen, unseen = split(len(self.observations))
        scales = self.magnitudes(seen).scales(samples=len(seen))
        weights = hash_weights(weight_files(self.ckpt))
        return self.measured(replace(scales, weights=weights, held_out=len(unseen)), kept)

    def measured(self, scales: Scales, kept: Sequence[str]) -> Scales:
        """The same scales with `kept` in bfloat16, and the errors of that."""
        seen, unseen = split(len(self.observations))
        both = {*self._bf16, *kept}
        scales = replace(scales, bf16=tuple(name for name in products(self.tape) if name in both))
        of_unseen = self.errors(unseen, scales) if unseen else None
        return replace(scales, seen=self.errors(seen, scales), unseen=of_unseen)


class Runner(Calibration):
    """On the reference executor. device: "reference" or "reference:cuda". Raises EngineError where PyTorch is
    missing."""

    def __init__(self, ckpt: Checkpoint, observations: Sequence[Observation], *, device: str) -> None:
        name, _, self._place = device.partition(":")
        if name != "reference":
            raise EngineError(
                f"calibrate: device: expected reference or reference:cuda, got {device!r}: it observes every operation"
            )
        self._executor_of = import_reference("the reference executor")
        self._executors: dict[int, ReferenceExecutor] = {}
        super().__init__(ckpt, observations)

    def _executor(self, tokens: int) -> ReferenceExecutor:
        bucket = next(b for b in prompt_buckets(self._processors.max_tokens) if tokens <= b)
        if bucket not in self._executors:
            like = next(iter(self._executors.values()), None)
            self._executors[bucket] = self._executor_of(
                self._tape(bucket), weight_reader(self.ckpt), "bf16", device=self._place or "cpu", like=like
            )
        return self._executors[bucket]

    def run(
        self, index: int, scales: Scales | None = None, observe: Callable[[Op, Torch], None] | None = None
    ) -> Actions:
        """As `Calibration.run`. observe: see `ReferenceExecutor`; it is called for operations in the prefix with the
        rows that some query sees."""
        encoded = self._encoded(index)
        executor = self._executor(len(encoded.tokens))
        inputs = self._inputs(index, executor.tape, encoded)
        executor.scales = scales
        executor.observe = None if observe is None else partial(_seen_rows, inputs["blocks"], observe)
        model = executor.run(inputs)["actions"].astype(np.float32)
        executor.observe = None
        return self._actions(index, model, inputs["actions"])

    def magnitudes(self, indices: Sequence[int]) -> Magnitudes:
        found = Magnitudes(self.tape)
        for i in indices:
            self._plain[i] = self.run(i, observe=found.observe)
        return found

    def layers(self, scales: Scales, *, most: int = 8) -> dict[str, Errors]:
        """What each product that may be in fp8 adds alone, all others being in bfloat16, over up to `most`
        observations, spread evenly; the worst first."""
        count = len(self.observations)
        indices = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
        names = products(self.tape)
        found = {}
        for name in names:
            if name in self._bf16:
                continue
            others = tuple(other for other in names if other != name)
            found[name] = self.errors(indices, replace(scales, bf16=others))
        return dict(sorted(found.items(), key=lambda item: -item[1].relative_l2))


def split(count: int) -> tuple[range, range]:
    """Indices to calibrate on and to hold out: the last quarter, nothing of one observation."""
    first = count - max(count // 4, min(1, count - 1))
    return range(first), range(first, count)


def seen_rows(op: Op, blocks: npt.NDArray[Any], rows: int) -> npt.NDArray[np.intp] | slice:
    """Which rows of a left operand count. Rows of the prefix that are padding, or of a camera that is missing, are
    computed but seen by no query: what they hold must not widen a scale."""
    return np.flatnonzero(blocks[:rows, 0] != UNSEEN) if op.stage == "prefix" else slice(None)


def _seen_rows(blocks: npt.NDArray[Any], observe: Callable[[Op, Torch], None], op: Op, x: Torch) -> None:
    observe(op, x[..., seen_rows(op, blocks, x.shape[-2]), :])
