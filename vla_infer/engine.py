"""The C++ engine under a tape: weights read once and packed, one arena, one program for each prompt bucket.

The tapes of one policy differ only in how many prompt tokens they take; they share weights and arena.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vla_infer import _engine
from vla_infer.arena import Layout, plan
from vla_infer.errors import EngineError
from vla_infer.fp8 import Scales, in_fp8, key, products, stored_in_fp8
from vla_infer.tape import Op, Tape, Tensor, Weight

Array = npt.NDArray[np.generic]
ReadWeight = Callable[[str], Array]
Place = tuple[int, int, int, int, int, int, int]

_ARENA, _TABLES = -1, -2
_STACKED, _INTERLEAVED = 0, 1
_PHASES = {"load": 0, "before": 1, "loop": 2, "after": 3}
_DTYPES = {"f32": 0, "i32": 2, "u8": 3, "e4m3": 5}
_BYTES = {0: 4, 1: 2, 2: 4, 3: 1, 5: 1}
# Bytes of an "act" value. In int8 activations are bfloat16 between operations; the products are 8-bit integers. "fp8"
# is not here: it needs scales beside the checkpoint.
PRECISIONS = {"fp32": 4, "bf16": 2, "int8": 2}


def in_int8(op: Op) -> bool:
    """Whether precision "int8" computes an operation in 8-bit integers.

    Products whose left operand is an activation, and attention that masks nothing (the vision encoder's). Not: what
    is computed once at load (tables), products with raw state or actions (float32 operands), the Euler step,
    weights that the model keeps (`Weight.keep`), and of what is made of the prefix all but gate and up, where a few
    large values in a row leave the others hardly any steps.
    """
    if op.kind == "attention":
        return "q_block" not in op.operands
    if op.at_load or op.kind not in ("linear", "gated_linear", "qkv"):
        return False
    of_prefix = op.stage in ("prefix", "head") and not op.loop
    if of_prefix and op.kind != "gated_linear":
        return False
    return op.operands["x"].dtype == "act" and not any(w.keep for w in op.weights)


def kept_in_fp8(tape: Tape, scales: Scales) -> dict[int, float]:
    """Those buffers of `stored_in_fp8` that the CUDA engine keeps as E4M3, with their scales: all whose writers end in
    it (attention, and the products that are in fp8 themselves) and whose rows start on multiples of 16 bytes. What a
    product kept in bfloat16 writes stays bfloat16; its reader converts it on the way into its scratch."""
    kept = dict(stored_in_fp8(tape, scales))
    for op in tape.ops:
        product = op.kind in ("linear", "gated_linear", "qkv")
        for t in (*op.reads, *op.writes):
            if t.buffer.cols % 16 or t.col % 16:
                kept.pop(t.buffer.id, None)
        for t in op.writes:
            if product and not in_fp8(op, scales.bf16):
                kept.pop(t.buffer.id, None)
    return kept


class Program:
    """One tape made ready. Not thread-safe: programs of an engine share its arena. e4m3: see `kept_in_fp8`."""

    def __init__(self, engine: Engine, tape: Tape, layout: Layout, e4m3: Mapping[int, float]) -> None:
        self._engine = engine
        self._layout = layout
        self._e4m3 = e4m3
        self._native = _engine.Program(engine._native, layout.table_bytes)
        looped = [i for i, op in enumerate(tape.ops) if op.loop]
        for i, op in enumerate(tape.ops):
            after = bool(looped) and i > looped[-1]
            phase = "load" if op.at_load else "loop" if op.loop else "after" if after else "before"
            operands = {name: self._place(t) for name, t in op.operands.items()}
            weights = [engine._packed(op)] if op.weights else []
            attrs = dict(op.attrs)
            if op.kind == "attention" and engine.int8 and in_int8(op):
                attrs["int8"] = 1
            if engine._in_fp8(op):
                attrs["x_scale"] = engine._scale(op)
            for t in op.writes:
                if t.buffer.id in e4m3:
                    attrs["out_scale"] = e4m3[t.buffer.id]
            self._native.add(_PHASES[phase], op.kind, operands, weights, attrs)
        inputs = [(name, self._place(t)) for name, t in tape.inputs.items()]
        outputs = [(name, self._place(t)) for name, t in tape.outputs.items()]
        self._stages = [op.stage for op in tape.ops if not op.at_load]
        self._native.finish(tape.steps, [p for _, p in inputs], [p for _, p in outputs])
        # float32, int32 and uint8 views of memory that the engine owns; bfloat16 shows as uint16
        self.inputs = {name: self._native.input(i, p) for i, (name, p) in enumerate(inputs)}
        self.outputs = {name: self._native.output(i, p) for i, (name, p) in enumerate(outputs)}
        self._index = {name: i for i, (name, _) in enumerate(inputs)}

    def _place(self, t: Tensor) -> Place:
        dtype = "e4m3" if t.buffer.id in self._e4m3 else t.dtype
        code = self._engine._act_code if dtype == "act" else _DTYPES[dtype]
        size = _BYTES[code]
        offset = (t.row * t.buffer.cols + t.col) * size
        if t.buffer.id in self._layout.tables:
            store, offset = _TABLES, offset + self._layout.tables[t.buffer.id]
        elif t.buffer.kind in ("param", "constant"):
            store = self._engine._stored(t)
        else:
            store, offset = _ARENA, offset + self._layout.arena[t.buffer.id]
        return (store, offset, t.rows, t.cols, t.buffer.cols, t.step * t.buffer.cols * size, code)

    def stage(self, name: str, rows: Sequence[Array | None]) -> None:
        """Begin to fill the rows of input `name` from uint8 arrays of any shape and up to a row's size. What no array
        covers, such as a row that is None or not given, is undefined in the next `run`.

        On a GPU other threads copy, and what was copied is sent at once: until `settle` or `run` returns, the arrays
        must stay as they are, and this input must not be filled by hand; others can be. Arrays of
        `Engine.host_memory` are not copied: the GPU reads them, until `run` returns.
        Raises EngineError for an array of another type, or longer than a row.
        """
        dense = [None if row is None else np.ascontiguousarray(row) for row in rows]
        self._native.stage(self._index[name], dense)

    def settle(self) -> None:
        """Return when arrays given to `stage` may change, but those of `Engine.host_memory`. Raises as `run`."""
        self._native.settle()

    def run(self, times: int = 1) -> None:
        """Inputs to outputs, `times` times over, without the interpreter's lock.

        Raises:
            DeviceLostError: the device can do nothing more in this process.
            EngineError: anything else that the device reports.
        """
        self._native.run(times)

    def profile(self) -> dict[str, float]:
        """Seconds by stage of one run, operation by operation; empty where the device cannot tell."""
        seconds = self._native.profile()
        stages: dict[str, float] = {}
        for stage, s in zip(self._stages, seconds, strict=False):
            stages[stage] = stages.get(stage, 0.0) + s
        return stages

    @property
    def graph_nodes(self) -> int:
        """Of the CUDA graph that `run` launches; 0 on a CPU."""
        return int(self._native.graph_nodes)

    def result(self, name: str) -> npt.NDArray[np.float32]:
        """A copy of an output as float32."""
        values = self.outputs[name]
        if values.dtype == np.uint16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return np.array(values, np.float32)


def _check_fp8(device: str, tapes: Sequence[Tape], scales: Scales | None) -> None:
    if device.partition(":")[0] != "cuda":
        raise EngineError(
            f"engine: precision 'fp8': device {device!r} does not have it: use 'cuda', or precision 'bf16'"
        )
    if scales is None:
        raise EngineError(
            "engine: precision 'fp8': expected the policy's scales, got none: run vla-infer calibrate POLICY"
        )
    for name in (name for tape in tapes for name in products(tape)):
        if name not in scales.activations:
            raise EngineError(f"engine: precision 'fp8': no scale of {name}: run vla-infer calibrate POLICY")


class Engine:
    """Builds programs for tapes that share weights.

    `read` gives a tensor of the checkpoint by name, float32 or bfloat16 bits as uint16; it is asked once for each
    use and the array is let go after packing. precision: "fp32", "bf16", on the CPU "int8" (see `in_int8`), or on
    a GPU of compute capability 9.0 "fp8" (see `vla_infer.fp8`), which needs the policy's scales. threads: None takes
    every processor; on a GPU, those that `Program.stage` copies with, None takes a few.
    Raises EngineError where the device is not to be had or cannot run an operation.
    """

    def __init__(
        self,
        tapes: Sequence[Tape],
        read: ReadWeight,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        threads: int | None = None,
        scales: Scales | None = None,
    ) -> None:
        if precision not in (*PRECISIONS, "fp8"):
            raise EngineError(
                f"engine: precision: expected one of {', '.join(PRECISIONS)}, fp8, got {precision!r}"
            )
        if precision == "fp8":
            _check_fp8(device, tapes, scales)
        self._scales = scales if precision == "fp8" else None
        if precision == "int8" and device != "cpu" and not device.startswith("cpu:"):
            raise EngineError(
                f"engine: precision 'int8': device {device!r} does not have it: use 'cpu', or precision 'bf16'"
            )
        self.int8 = precision == "int8"
        self._act_code = 0 if precision == "fp32" else 1
        self._read = read
        self._weights: dict[object, int] = {}
        self._tensors: dict[object, int] = {}
        self._native = _engine.Engine(device=device, bf16=precision != "fp32", threads=threads or 0)
        e4m3 = [kept_in_fp8(tape, self._scales) if self._scales else {} for tape in tapes]
        act_bytes = PRECISIONS.get(precision, 2)
        layouts = [plan(tape, act_bytes, kept) for tape, kept in zip(tapes, e4m3, strict=True)]
        self._native.reserve(max(layout.arena_bytes for layout in layouts))
        self.programs = [Program(self, *each) for each in zip(tapes, layouts, e4m3, strict=True)]

    @property
    def device_name(self) -> str:
        return str(self._native.device_name)

    @property
    def weight_bytes(self) -> int:
        return int(self._native.weight_bytes)

    @property
    def arena_bytes(self) -> int:
        """Everything beside the weights: arena, tables and scratch."""
        return int(self._native.arena_bytes)

    @property
    def memory_in_use(self) -> int:
        """Bytes of the GPU's memory that are in use, by every program on it; 0 on a CPU."""
        return int(self._native.memory_in_use)

    def host_memory(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Zeros in memory that a GPU reads by itself, so that `Program.stage` has nothing to copy; on a CPU in usual
        memory. It outlives the engine. Raises EngineError where there is no room."""
        return self._native.host_memory(math.prod(shape)).reshape(shape)

    def copy_rate(self, size: int) -> float:
        """Bytes a second, read and written, of copies of `size` bytes within the GPU's memory; 0 on a CPU."""
        return float(self._native.copy_rate(size))

    def _matrix(self, w: Weight) -> Array:
        values = self._read(w.name)
        values = values.reshape(values.shape[0], -1)
        return values if w.cols is None else values[:, w.cols[0] : w.cols[1]]

    def _in_fp8(self, op: Op) -> bool:
        return self._scales is not None and in_fp8(op, self._scales.bf16)

    def _scale(self, op: Op) -> float:
        """s_x of a product in fp8."""
        assert self._scales is not None
        return self._scales.activations[key(op)]

    def _packed(self, op: Op) -> int:
        packing = _INTERLEAVED if op.kind == "gated_linear" else _STACKED
        int8, fp8 = self.int8 and in_int8(op), self._in_fp8(op)
        name = (packing, op.weights, int8, fp8)
        if name not in self._weights:
            rows = op.operands["h" if op.kind == "euler" else "x"].rows
            parts = [self._matrix(w) for w in op.weights]
            for w, part in zip(op.weights, parts, strict=True):
                if part.shape != (w.n, w.k):
                    raise EngineError(f"engine: {w.name}: expected ({w.n}, {w.k}), got {part.shape}")
            native = self._native
            self._weights[name] = (
                native.pack_int8(packing, parts)
                if int8
                else native.pack_fp8(packing, parts)
                if fp8
                else native.pack(packing, parts, rows)
            )
        return self._weights[name]

    def _stored(self, t: Tensor) -> int:
        buffer = t.buffer
        name: object = buffer.name if buffer.kind == "param" else (buffer.name, buffer.values.tobytes())  # type: ignore[union-attr]
        if name not in self._tensors:
            values = self._read(buffer.name) if buffer.kind == "param" else np.asarray(buffer.values)
            values = values.reshape(buffer.rows, buffer.cols)
            if buffer.dtype == "i32":
                self._tensors[name] = self._native.store_ints(values.astype(np.int32))
            else:
                if values.dtype != np.uint16:
                    values = values.astype(np.float32)
                dtype = self._act_code if buffer.dtype == "act" else 0
                self._tensors[name] = self._native.store(np.ascontiguousarray(values), dtype)
        return self._tensors[name]
