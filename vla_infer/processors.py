"""A policy's processor pipelines: robot state and instruction → model inputs, action chunk → robot units.

The steps, their order and their statistics are those of policy_preprocessor.json and
policy_postprocessor.json; each step that LeRobot registers for these policies has a class here. Images are
not their business: the engine resizes and scales them. What LeRobot computes is computed in the same order in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_infer.checkpoint import Checkpoint, ProcessorStep
from vla_infer.errors import CheckpointError, EngineError, ObservationError, UnsupportedError
from vla_infer.instruction import clean_instruction
from vla_infer.json_io import show
from vla_infer.normalize import Array, Normalizer, make_normalizer
from vla_infer.policy_config import ACTION, FEATURE_TYPES, NORMALIZATION_MODES, STATE
from vla_infer.processor_steps import NewLine, Normalize, Relative, StatePrompt, Step, Tokenize, Work
from vla_infer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Encoded:
    """One observation as the model takes it."""

    #: (state_dim,) float32, normalised, not padded.
    state: Array
    #: (L,) int32, not padded.
    tokens: npt.NDArray[np.int32]
    #: The text that was tokenized.
    prompt: str


class Processors:
    """A policy's two pipelines; made by `build_processors`. Safe to use from several threads."""

    def __init__(
        self, ckpt: Checkpoint, before: list[Step], after: list[Step], rename_map: dict[str, str]
    ) -> None:
        self.state_dim = ckpt.state_dim
        self.action_dim = ckpt.action_dim
        #: Names of a robot's features → names that the policy knows; from the rename step.
        self.rename_map = rename_map
        self._before = before
        self._after = after

    @property
    def max_tokens(self) -> int:
        """Most tokens that `encode` returns."""
        return max(step.tokenizer.max_length for step in self._before if isinstance(step, Tokenize))

    def encode(self, state: npt.NDArray[np.floating], task: str) -> Encoded:
        """Normalise the state and tokenize the instruction.

        Args:
            state: (state_dim,) in robot units.
            task: the instruction; `vla_infer.instruction` states what is accepted.

        Raises:
            ObservationError: the state has another shape, is not finite or is far out of the policy's range;
                the instruction is not acceptable.
        """
        raw = self._check_state(state)
        work = Work(raw_state=raw, state=raw, prompt=clean_instruction(task))
        for step in self._before:
            step.observe(work)
        assert work.tokens is not None  # build_processors made sure that a step tokenizes
        return Encoded(np.array(work.state, np.float32), work.tokens, work.prompt)

    def decode(self, actions: npt.NDArray[np.float32], state_raw: npt.NDArray[np.floating]) -> Array:
        """Action chunk in model units → robot units.

        Args:
            actions: (H, A) with A at least action_dim; the columns beyond it are the model's padding.
            state_raw: (state_dim,) robot units, of the observation that the chunk came from; relative actions
                are relative to it.

        Returns:
            (H, action_dim) float32, the caller's own. Values that are not finite stay: the guard judges them.
        """
        raw = self._check_state(state_raw)
        if actions.ndim != 2 or actions.shape[1] < self.action_dim:
            raise EngineError(f"actions: expected (H, at least {self.action_dim}), got {actions.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            result = np.array(actions[:, : self.action_dim], np.float32)
            for step in self._after:
                result = step.backward(result, raw)
        return result

    def denormalize_state(self, state: Array) -> Array:
        """Normalised state (state_dim,) → robot units: what `encode` would turn into it. For making states up."""
        for step in self._before:
            if isinstance(step, Normalize):
                state = step.state.unnormalize(state)
        return state

    def normalize_actions(
        self, robot_actions: npt.NDArray[np.floating], state_raw: npt.NDArray[np.floating]
    ) -> Array:
        """Robot units → model units: what `decode` would turn into `robot_actions` for this state.

        For real-time chunking: the unexecuted rest of a chunk, expressed for the next observation. Relative
        actions become relative to the state given here, the current one, not to that of the old chunk.

        Args:
            robot_actions: (H, action_dim) finite.
            state_raw: (state_dim,) robot units, of the observation that the next chunk starts from.

        Returns:
            (H, action_dim) float32; not padded to the model's width.

        Raises:
            ObservationError: shapes differ, or values are not finite.
        """
        raw = self._check_state(state_raw)
        with np.errstate(over="ignore"):
            result = np.array(robot_actions, np.float32)
        if result.ndim != 2 or result.shape[1] != self.action_dim or not bool(np.isfinite(result).all()):
            raise ObservationError(f"actions: expected finite (H, {self.action_dim}), got {result.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            for step in self._before:
                result = step.forward(result, raw)
        if not bool(np.isfinite(result).all()):
            raise ObservationError("actions: too far from the policy's statistics to normalise")
        return result

    def _check_state(self, state: npt.NDArray[np.floating]) -> Array:
        if not isinstance(state, np.ndarray) or state.dtype.kind not in "fiu":
            kind = state.dtype if isinstance(state, np.ndarray) else type(state).__name__
            raise ObservationError(f"state: expected an array of ({self.state_dim},) numbers, got {kind}")
        if state.shape != (self.state_dim,):
            raise ObservationError(f"state: expected shape ({self.state_dim},), got {state.shape}")
        with np.errstate(over="ignore"):
            raw = state.astype(np.float32)
        if not bool(np.isfinite(raw).all()):
            raise ObservationError(f"state[{int(np.argmin(np.isfinite(raw)))}]: not a finite float32 number")
        return raw


def build_processors(ckpt: Checkpoint) -> Processors:
    """Build a policy's processors from its JSON files, statistics and tokenizer.

    Raises:
        UnsupportedError: a step, or an option of one, that this package does not have; it is named.
        CheckpointError: a step's configuration, statistics or tokenizer is missing or not valid.
    """
    builder = _Builder(ckpt)
    before = [builder.build(step, _BEFORE, "preprocessor") for step in ckpt.preprocessor]
    after = [builder.build(step, _AFTER, "postprocessor") for step in ckpt.postprocessor]
    if sum(isinstance(step, Tokenize) for step in before) != 1:
        raise CheckpointError(f"{ckpt.path}: the preprocessor needs exactly one tokenizer_processor")
    _check_order(ckpt, before, after)
    return Processors(ckpt, before, after, builder.rename_map)


def _check_order(ckpt: Checkpoint, before: list[Step], after: list[Step]) -> None:
    """Both pipelines must be each other's inverse, and a prompt step must see the normalised state."""
    kinds = (Relative, Normalize)
    forward = [type(step) for step in before if isinstance(step, kinds)]
    backward = [type(step) for step in after if isinstance(step, kinds)]
    if backward != forward[::-1] or Normalize not in forward or len(forward) != len(set(forward)):
        raise UnsupportedError(
            f"{ckpt.path}: the postprocessor does not undo what the preprocessor does to actions; expected "
            "relative_actions, normalizer and then unnormalizer, absolute_actions, each once or not at all"
        )
    if forward == [Normalize, Relative]:
        raise UnsupportedError(f"{ckpt.path}: relative_actions_processor after normalizer_processor")
    order = [type(step) for step in before]
    prompts = [i for i, kind in enumerate(order) if kind in (StatePrompt, NewLine)]
    if any(i > order.index(Tokenize) for i in prompts) or len(prompts) > 1:
        raise UnsupportedError(f"{ckpt.path}: expected one prompt step before tokenizer_processor")
    if (StatePrompt in order) != (ckpt.family == "pi05"):
        raise UnsupportedError(f"{ckpt.path}: pi05 needs the state in its prompt, and only pi05 does")
    if StatePrompt in order and order.index(StatePrompt) < order.index(Normalize):
        raise UnsupportedError(f"{ckpt.path}: the state enters the prompt before it is normalised")


class _Builder:
    """Makes steps from their JSON."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self.ckpt = ckpt
        self.rename_map: dict[str, str] = {}
        self._mask = np.ones(ckpt.action_dim, np.bool_)

    def build(
        self,
        step: ProcessorStep,
        table: Mapping[str, Callable[[_Builder, ProcessorStep], Step]],
        pipeline: str,
    ) -> Step:
        make = table.get(step.name)
        if make is None:
            raise UnsupportedError(
                f"{step.where}: {pipeline} step {show(step.name)} is not supported; supported: "
                f"{', '.join(table)}"
            )
        return make(self, step)

    def nothing(self, step: ProcessorStep) -> Step:
        return Step()

    def device(self, step: ProcessorStep) -> Step:
        if step.config.data.get("float_dtype") not in (None, "float32"):
            raise UnsupportedError(
                f"{step.where}: float_dtype = {show(step.config.data['float_dtype'])} is not supported; "
                "supported: null, float32"
            )
        return Step()

    def rename(self, step: ProcessorStep) -> Step:
        self.rename_map.update(step.config.string_map("rename_map"))
        return Step()

    def new_line(self, step: ProcessorStep) -> Step:
        return NewLine()

    def tokenize(self, step: ProcessorStep) -> Step:
        return Tokenize(load_tokenizer(self.ckpt, step))

    def state_prompt(self, step: ProcessorStep) -> Step:
        if step.config.text("task_key", "task") != "task":
            raise UnsupportedError(f"{step.where}: another task_key than task is not supported")
        return StatePrompt()

    def relative(self, step: ProcessorStep) -> Step:
        config = step.config
        exclude, names = config.strings("exclude_joints"), config.strings("action_names")
        if not config.boolean("enabled", default=False):
            return Step()
        if self.ckpt.state_dim < self.ckpt.action_dim:
            raise CheckpointError(
                f"{step.where}: actions relative to the state need as many state values as actions, got "
                f"{self.ckpt.state_dim} and {self.ckpt.action_dim}"
            )
        self._mask = _relative_mask(self.ckpt.action_dim, exclude or [], names)
        return Relative(self._mask)

    def absolute(self, step: ProcessorStep) -> Step:
        return Relative(self._mask) if step.config.boolean("enabled", default=False) else Step()

    def normalizer(self, step: ProcessorStep) -> Step:
        modes = step.config.object("norm_map")
        for kind in modes.data:
            if kind not in FEATURE_TYPES:
                raise CheckpointError(f"{modes.where}: unknown feature type {show(kind)}")
        images = modes.text("VISUAL", "IDENTITY", choices=NORMALIZATION_MODES)
        if images != "IDENTITY":
            raise UnsupportedError(f"{step.where}: {images} of images is not supported; supported: IDENTITY")
        stats = self.ckpt.read_state(step.state_file) if step.state_file is not None else {}
        eps = step.config.number("eps", 1e-8)
        features = step.config.object("features")
        keys = step.config.strings("normalize_observation_keys")

        def make(key: str, kind: str, dim: int, *, listed: bool) -> Normalizer:
            if key in features.data:
                kind = features.object(key).text("type", choices=FEATURE_TYPES)
                (size,) = features.object(key).sizes("shape", length=1)
                if size != dim:
                    raise CheckpointError(
                        f"{features.where}: {key} has {size} values, config.json states {dim}"
                    )
            mode = modes.text(kind, "IDENTITY", choices=NORMALIZATION_MODES) if listed else "IDENTITY"
            return make_normalizer(mode, key, dim, stats, eps=eps, where=step.where)

        # LeRobot normalises the observations that are listed, and actions always.
        listed = STATE in features.data and (keys is None or STATE in keys)
        return Normalize(
            make(STATE, "STATE", self.ckpt.state_dim, listed=listed),
            make(ACTION, "ACTION", self.ckpt.action_dim, listed=True),
        )


def _relative_mask(dim: int, exclude: list[str], names: list[str] | None) -> npt.NDArray[np.bool_]:
    """True where an action is relative: every dimension but those whose name holds an excluded name.

    Without names every dimension is relative; a name that is missing at the end counts as not excluded.
    """
    parts = [part.lower() for part in exclude if part]
    known = [name.lower() for name in names or []][:dim]
    mask = np.ones(dim, np.bool_)
    for i, name in enumerate(known):
        mask[i] = not any(part in name for part in parts)
    return mask


_BEFORE: Mapping[str, Callable[[_Builder, ProcessorStep], Step]] = {
    "rename_observations_processor": _Builder.rename,
    "to_batch_processor": _Builder.nothing,
    "smolvla_new_line_processor": _Builder.new_line,
    "pi0_new_line_processor": _Builder.new_line,
    "pi05_prepare_state_tokenizer_processor_step": _Builder.state_prompt,
    "tokenizer_processor": _Builder.tokenize,
    "device_processor": _Builder.device,
    "relative_actions_processor": _Builder.relative,
    "normalizer_processor": _Builder.normalizer,
}
_AFTER: Mapping[str, Callable[[_Builder, ProcessorStep], Step]] = {
    "unnormalizer_processor": _Builder.normalizer,
    "absolute_actions_processor": _Builder.absolute,
    "device_processor": _Builder.device,
    "to_batch_processor": _Builder.nothing,
}
