"""Precision "fp8": which products it computes in 8-bit floating point, by what scales, and the file that keeps these.

A product y = x W^T of the vision encoder and the prefix becomes, output by output,

    y[n] = s_x s_w[n] (q(x / s_x) . q(W[n] / s_w[n])),        q: to the nearest E4M3, ties to even,

with exact products, sums in float32 and everything after (bias, activation, gate, residual) as in "bf16". s_w[n] is
the largest magnitude of row n / 448. s_x is one number for each operation: HEADROOM times the largest magnitude that
its left operand, after its norm, had in calibration / 448; what is larger later is clipped. `vla-infer calibrate`
finds the s_x and writes them beside the policy as `fp8.json`, with hashes of the weights and the tape they belong to.

E4M3 (Micikevicius et al. 2022): 4 bits of exponent, 3 of fraction, no infinities, largest 448, smallest 2^-9.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vla_infer.errors import CheckpointError, EngineError
from vla_infer.json_io import Fields, load_json_object, show
from vla_infer.tape import NORMS, WRITES, Op, Tape

if TYPE_CHECKING:
    from vla_infer.checkpoint import Checkpoint

FILE = "fp8.json"
VERSION = 1
E4M3_MAX = 448.0
HEADROOM = (
    2.0  # a binade for what calibration did not see: floating point loses nothing by it, clipping costs much
)
MAX_ERROR = 0.0998  # a relative error of e leaves a cosine of at least sqrt(1 - e^2): 0.995
DEVICES = ("cuda", "reference")  # of the GPUs those of compute capability 9.0: the engine refuses others
STAGES = ("vision", "prefix")
# What can write 8-bit values: their kernels end in a conversion of float32 anyway.
_WRITERS = ("linear", "gated_linear", "attention", "space_to_depth", "image_patches")
_READ = 1 << 22  # bytes that the hash of the weights takes at a time

Floats = npt.NDArray[np.floating]


def round_e4m3(x: Floats) -> npt.NDArray[np.float32]:
    """The nearest E4M3 of every value, ties to even, as float32. Beyond 448, infinities too, it is 448 of the same
    sign; NaN stays NaN."""
    x = np.clip(np.asarray(x, np.float32), -E4M3_MAX, E4M3_MAX)
    _, exponent = np.frexp(x)
    # 3 bits of fraction; below 2^-6 evenly spaced
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, -6) - 3)
    rounded: npt.NDArray[np.float32] = np.rint(x / step) * step
    return rounded


def scale_of(largest: Floats | float) -> npt.NDArray[np.float32]:
    """The scale, float32, that takes values of up to `largest` magnitude to E4M3's range; 1 where all are zero (or so
    small that the scale would not be a normal float32)."""
    scale = np.array(largest, np.float32)
    scale /= np.float32(E4M3_MAX)
    # written so that NaN stays: it must be in the result and not be rounded away
    scale[scale < np.finfo(np.float32).tiny] = 1
    return scale


def row_scales(weight: Floats) -> npt.NDArray[np.float32]:
    """One scale for each row of a weight (n, k): (n,)."""
    return scale_of(np.abs(np.asarray(weight, np.float32)).max(1))


def key(op: Op) -> str:
    """The name of a product in the calibration file: that of its first weight, and the columns where it takes some.
    Equal for every prompt bucket. Products that share it share their scale."""
    w = op.weights[0]
    return w.name if w.cols is None else f"{w.name}[:, {w.cols[0]}:{w.cols[1]}]"


def in_fp8(op: Op, kept: Collection[str] = ()) -> bool:
    """Whether precision "fp8" computes an operation in 8 bits: the products of the vision encoder and the prefix on
    activations. Not: raw state (a float32 operand), what is computed at load or in the loop, weights that the model
    keeps (`Weight.keep`), and operations whose `key` is in `kept`."""
    return (
        op.kind in ("linear", "gated_linear", "qkv")
        and op.stage in STAGES
        and not op.loop
        and not op.at_load
        and op.operands["x"].dtype == "act"
        and not any(w.keep for w in op.weights)
        and key(op) not in kept
    )


def products(tape: Tape) -> tuple[str, ...]:
    """The keys of everything that fp8 could compute, in order."""
    return tuple(dict.fromkeys(key(op) for op in tape.ops if in_fp8(op)))


def named(tape: Tape, parts: Collection[str], *, where: str = "fp8") -> tuple[str, ...]:
    """Those `products` whose names contain one of `parts`, in order. Raises EngineError for a part that no name
    contains; where: `parts` are from."""
    names = products(tape)
    for part in parts:
        if not any(part in name for name in names):
            raise EngineError(f"{where}: no product has {part!r} in its name; one of them: {names[0]}")
    return tuple(name for name in names if any(part in name for part in parts))


def stored_in_fp8(tape: Tape, scales: Scales) -> dict[int, float]:
    """The buffers, by id, whose values need not be kept but as E4M3 in units of the scale given here.

    Those are: every reader is a product in fp8 that takes them as its left operand without a norm, all with one
    scale, and every writer is one of `_WRITERS`, outside the loop.
    """
    found: dict[int, set[float]] = {}
    other = {t.buffer.id for t in tape.outputs.values()}
    for op in tape.ops:
        for t in op.writes:
            if op.kind not in _WRITERS or op.loop or op.at_load or t.buffer.kind != "temp":
                other.add(t.buffer.id)
        for name, t in op.operands.items():
            if name in WRITES[op.kind] and op.kind != "euler":
                continue
            if name == "x" and in_fp8(op, scales.bf16) and op.attrs["norm"] == NORMS["none"]:
                found.setdefault(t.buffer.id, set()).add(scales.activations[key(op)])
            else:
                other.add(t.buffer.id)
    return {id_: min(values) for id_, values in found.items() if len(values) == 1 and id_ not in other}


def hash_tape(tape: Tape) -> str:
    """SHA-256 of what a policy computes before its loop: kinds, weights, attributes, types, widths and which operation
    takes what from which. Equal for every prompt bucket, picture size and count of denoising steps."""
    numbers: dict[int, int] = {}
    lines = []
    for op in tape.ops:
        if op.loop or op.at_load:
            continue
        operands = {
            name: (numbers.setdefault(t.buffer.id, len(numbers)), t.dtype, 0 if t.dtype == "u8" else t.cols)
            for name, t in sorted(op.operands.items())
        }
        weights = [(w.name, w.n, w.k, w.cols, w.keep) for w in op.weights]
        attrs = {name: float(value) for name, value in sorted(op.attrs.items())}
        lines.append(json.dumps([op.kind, op.stage, operands, weights, attrs]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_weights(files: Iterable[Path]) -> str:
    """SHA-256 over every byte of the files, in the order of their names: what `cat FILES | sha256sum` says.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        try:
            with path.open("rb") as file:
                while block := file.read(_READ):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()


@dataclass(frozen=True)
class Errors:
    """How far fp8 is from bfloat16 over some observations. Of the actions in model units: the lowest and the median
    cosine, the lowest cosine of what the policy adds to the noise it starts from, the largest and the median
    relative L2 error; and the largest difference of an action in robot units."""

    cosine: float
    cosine_median: float
    cosine_added: float
    relative_l2: float
    relative_l2_median: float
    action_difference: float


@dataclass(frozen=True)
class Scales:
    """A calibration. activations: s_x by `key`, of every product that fp8 could compute; bf16: those that stay in
    bfloat16; weights and tape: `hash_weights` and `hash_tape`; samples: observations that the scales are from, with
    `seen` measured on them; held_out: others, with `unseen` measured on those (None where there are none)."""

    activations: Mapping[str, float]
    bf16: tuple[str, ...]
    weights: str
    tape: str
    samples: int
    held_out: int
    seen: Errors
    unseen: Errors | None

    def write(self, path: Path) -> None:
        """Write the file whole or not at all. Raises CheckpointError where it cannot be written."""
        document = {"version": VERSION, **asdict(self)}
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None

    def check(self, path: Path, tapes: Iterable[Tape], files: Iterable[Path]) -> None:
        """Raise CheckpointError unless these scales are of the policy with these tapes and weights. path: where they
        were read, beside the policy."""
        for tape in tapes:
            self._expect(path, "tape", hash_tape(tape), self.tape)
            missing = [name for name in products(tape) if name not in self.activations]
            if missing:
                raise CheckpointError(f"{path}: activations: no scale of {missing[0]}; {_mend(path)}")
        self._expect(path, "weights", hash_weights(files), self.weights)

    @staticmethod
    def _expect(path: Path, what: str, policy: str, file: str) -> None:
        if policy != file:
            raise CheckpointError(
                f"{path}: stale, {what} changed: expected {policy[:12]}… (the policy), got {file[:12]}…; {_mend(path)}"
            )


def weight_files(ckpt: Checkpoint) -> set[Path]:
    """The files of a policy's weights."""
    return {info.file for info in ckpt.tensors.values()}


def policy_scales(ckpt: Checkpoint, tapes: Iterable[Tape], *, device: str) -> Scales:
    """The calibration beside a policy. Raises CheckpointError where it is missing, not valid or stale, EngineError for
    a device that does not compute fp8."""
    if device.partition(":")[0] not in DEVICES:
        use = " or ".join(repr(name) for name in DEVICES)
        raise EngineError(
            f"precision 'fp8': device {device!r} does not have it: use {use}, or precision 'bf16'"
        )
    path = ckpt.path / FILE
    scales = read_scales(path)
    scales.check(path, tapes, weight_files(ckpt))
    return scales


def read_scales(path: Path) -> Scales:
    """Read a calibration file; `Scales.check` says whether it fits.

    Raises:
        CheckpointError: it is missing or not valid; one line with file, key and mend.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: missing; precision 'fp8' needs scales: {_mend(path)}")
    try:
        return _parse(Fields(load_json_object(path), str(path)))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_mend(path)}") from None


def _parse(file: Fields) -> Scales:
    version = file.integer("version", high=1 << 30)
    if version != VERSION:
        raise CheckpointError(f"{file.where}: version: expected {VERSION}, got {version}")
    _no_others(file, {"version", *(f.name for f in fields(Scales))})
    scales = file.object("activations")
    for name in scales.data:
        if not name.isprintable():
            raise CheckpointError(f"{scales.where}: expected names of weights, got {show(name)}")
    activations = {name: scales.number(name, low=1e-37) for name in scales.data}
    kept = file.strings("bf16")
    if kept is None:
        raise CheckpointError(f"{file.where}: bf16 is missing, expected a list of strings")
    for name in kept:
        if name not in activations:
            raise CheckpointError(f"{file.where}: bf16: {show(name)} is no product in activations")
    none = "unseen" in file.data and file.data["unseen"] is None
    return Scales(
        activations,
        tuple(kept),
        _hash(file, "weights"),
        _hash(file, "tape"),
        file.integer("samples"),
        file.integer("held_out", low=0),
        _errors(file.object("seen")),
        None if none else _errors(file.object("unseen")),
    )


def _errors(file: Fields) -> Errors:
    names = [f.name for f in fields(Errors)]
    _no_others(file, set(names))
    return Errors(**{name: file.number(name, low=-1.01) for name in names})


def _hash(file: Fields, name: str) -> str:
    value = file.text(name)
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise CheckpointError(f"{file.where}: {name}: expected 64 hexadecimal digits, got {show(value)}")
    return value


def _no_others(file: Fields, known: Collection[Any]) -> None:
    for name in file.data:
        if name not in known:
            expected = ", ".join(sorted(known))
            raise CheckpointError(f"{file.where}: {show(name)} is not known; expected {expected}")


def _mend(path: Path) -> str:
    return f"run: vla-infer calibrate {path.parent}"
