"""One observation in the inputs of a tape: which numbers go where, for every model family and every executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_infer.tape import Tape

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

DTYPES = {"f32": np.float32, "i32": np.int32, "u8": np.uint8}


@dataclass(frozen=True)
class TapeObservation:
    """What a tape is run on, after the processors.

    images: uint8 (h, w, 3) RGB for each camera of the model in its order, None for one that is missing;
    state: normalised, up to `state_dim` numbers; tokens: the prompt, up to the tape's places; noise: (horizon,
    action_dim); guide: the inputs of real-time chunking (`rtc.tape_inputs`), none for a fresh chunk.
    """

    images: Sequence[npt.NDArray[np.uint8] | None]
    state: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    noise: npt.NDArray[np.float32]
    guide: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def empty_inputs(tape: Tape) -> Arrays:
    """Zeros in the shapes and types of a tape's inputs."""
    return {name: np.zeros((t.rows, t.cols), DTYPES[t.dtype]) for name, t in tape.inputs.items()}


def fill_inputs(inputs: Mapping[str, Array], model: ModuleType, sizes: Any, seen: TapeObservation) -> None:
    """Write an observation into a tape's inputs, all of them.

    model: the family's module, `sizes` what its tape was recorded with.
    """
    for i, image in enumerate(seen.images):
        if image is not None:
            inputs["frames"][i, : image.size].reshape(image.shape)[...] = image
    fill_beside_frames(inputs, model, sizes, seen)


def fill_beside_frames(
    inputs: Mapping[str, Array], model: ModuleType, sizes: Any, seen: TapeObservation
) -> None:
    """As `fill_inputs`, without the pictures themselves: `frames` is left as it is."""
    inputs["geometry"][...] = 0
    for i, image in enumerate(seen.images):
        if image is not None:
            height, width = image.shape[:2]
            inputs["geometry"][i] = sizes.vision.geometry(height, width, 3 * width)
    inputs["tokens"][:] = 0
    inputs["tokens"][: len(seen.tokens), 0] = seen.tokens
    if "state" in inputs:  # π0.5 has it as text in the prompt
        inputs["state"][:] = 0
        inputs["state"][0, : len(seen.state)] = seen.state
    present = tuple(image is not None for image in seen.images)
    for name, values in _index(model, sizes, len(inputs["tokens"]), len(seen.tokens), present).items():
        inputs[name][...] = values
    inputs["actions"][...] = seen.noise
    for name in ("rtc_previous", "rtc_weight", "rtc_gain"):
        inputs[name][...] = seen.guide.get(name, 0)


@lru_cache(maxsize=64)
def _index(
    model: ModuleType, sizes: Any, prompt: int, tokens: int, present: tuple[bool, ...]
) -> Mapping[str, Array]:
    """The same from one observation to the next, unless the instruction or the cameras changed."""
    index: Mapping[str, Array] = model.index_inputs(sizes, prompt=prompt, tokens=tokens, present=present)
    return index
