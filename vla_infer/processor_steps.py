"""The steps of LeRobot's processor pipelines, as operations on a state, a prompt and an action chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.errors import ObservationError
from vla_infer.instruction import neutralize_markers
from vla_infer.normalize import Array, Normalizer
from vla_infer.tokenizer import PromptTokenizer

#: Edges of π0.5's state bins: bin k of 256 is [-1 + k/128, -1 + (k+1)/128); below is -1, above is 255.
_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]


@dataclass
class Work:
    """What the preprocessor's steps pass on."""

    raw_state: Array
    state: Array
    prompt: str
    #: Sets the prompt from a shorter instruction, when a step wrapped it; for truncation.
    wrap: Callable[[str], str] | None = None
    instruction: str = ""
    tokens: npt.NDArray[np.int32] | None = None


class Step:
    """A step that does nothing here (batching, devices); the base of the others."""

    def observe(self, work: Work) -> None:
        """Preprocessor: change `work` in place."""

    def forward(self, actions: Array, raw_state: Array) -> Array:
        """Preprocessor: actions (..., action_dim) one step towards model units."""
        return actions

    def backward(self, actions: Array, raw_state: Array) -> Array:
        """Postprocessor: actions (..., action_dim) one step towards robot units."""
        return actions


class NewLine(Step):
    """The prompt ends with one line break."""

    def observe(self, work: Work) -> None:
        work.prompt += "\n"


class Tokenize(Step):
    def __init__(self, tokenizer: PromptTokenizer) -> None:
        self.tokenizer = tokenizer

    def observe(self, work: Work) -> None:
        if work.wrap is not None:
            work.prompt = self._fit(work.wrap, work.instruction)
        work.tokens = self.tokenizer.encode(work.prompt)

    def _fit(self, wrap: Callable[[str], str], instruction: str) -> str:
        """The prompt with as much of the instruction as fits, so that what follows it is never cut."""

        def fits(length: int) -> bool:
            return self.tokenizer.count(wrap(instruction[:length].rstrip())) <= self.tokenizer.max_length

        if fits(len(instruction)):
            return wrap(instruction)
        low, high = 0, len(instruction)  # the longest prefix that fits is in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        while low > 0 and not fits(low):
            low -= 1
        if not fits(low):
            raise ObservationError(
                f"state: the prompt without any instruction is above {self.tokenizer.max_length} tokens"
            )
        return wrap(instruction[:low].rstrip())


class StatePrompt(Step):
    """π0.5: the normalised state as numbers 0 to 255 (-1 below the range) in the prompt."""

    def observe(self, work: Work) -> None:
        bins = np.digitize(work.state, _BIN_EDGES) - 1
        numbers = " ".join(str(int(b)) for b in bins)
        work.instruction = neutralize_markers(work.prompt)
        work.wrap = lambda task: f"Task: {task}, State: {numbers};\nAction: "
        work.prompt = work.wrap(work.instruction)


class Relative(Step):
    """Actions relative to the state in the dimensions of `mask`: relative = absolute - state."""

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self.mask = mask

    def _offset(self, raw_state: Array) -> Array:
        return raw_state[: len(self.mask)] * self.mask.astype(np.float32)

    def forward(self, actions: Array, raw_state: Array) -> Array:
        return actions - self._offset(raw_state)

    def backward(self, actions: Array, raw_state: Array) -> Array:
        return actions + self._offset(raw_state)


class Normalize(Step):
    def __init__(self, state: Normalizer, action: Normalizer) -> None:
        self.state = state
        self.action = action

    def observe(self, work: Work) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            work.state = self.state.normalize(work.state)
        if not bool(np.isfinite(work.state).all()):
            worst = int(np.argmin(np.isfinite(work.state)))
            raise ObservationError(
                f"state[{worst}]: {float(work.raw_state[worst]):g} is too far from the policy's statistics"
            )

    def forward(self, actions: Array, raw_state: Array) -> Array:
        return self.action.normalize(actions)

    def backward(self, actions: Array, raw_state: Array) -> Array:
        return self.action.unnormalize(actions)
