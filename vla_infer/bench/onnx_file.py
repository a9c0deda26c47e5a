"""An ONNX model on disk: nodes, and weights in a file beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

OPSET, IR = 20, 10  # Gelu came with opset 20
WEIGHTS = "weights.bin"
_INLINE = 1024  # bytes: what is shorter lies in the model itself
_PAGE = 4096

TYPES = {
    "f32": TensorProto.FLOAT,
    "act": TensorProto.FLOAT,
    "i32": TensorProto.INT32,
    "i64": TensorProto.INT64,
    "u8": TensorProto.UINT8,
    "i8": TensorProto.INT8,
    "bool": TensorProto.BOOL,
}
Array = npt.NDArray[Any]


class WeightFile:
    """Arrays in one file, each at the start of a page. A key that was placed before is not written again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._placed: dict[object, tuple[int, int, tuple[int, ...], int]] = {}
        self._end = 0

    def tensor(self, name: str, key: object, make: Callable[[], Array]) -> TensorProto:
        """An initializer called `name` of the array that `make` gives."""
        if key not in self._placed:
            values = np.asarray(make(), order="C")
            kind = helper.np_dtype_to_tensor_dtype(values.dtype)
            if values.nbytes < _INLINE:
                return onnx.numpy_helper.from_array(values, name)
            with (self.folder / WEIGHTS).open("ab") as file:
                file.write(bytes(-self._end % _PAGE))
                self._end += -self._end % _PAGE
                file.write(values.data)
            self._placed[key] = (self._end, values.nbytes, values.shape, kind)
            self._end += values.nbytes
        offset, size, shape, kind = self._placed[key]
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for entry, value in (("location", WEIGHTS), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=entry, value=str(value))
        return tensor


@dataclass
class Nodes:
    """A graph in the making."""

    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)


def info(name: str, dtype: str, shape: Sequence[int] | None) -> Any:
    return helper.make_tensor_value_info(name, TYPES[dtype], shape)


def save(
    nodes: Iterable[Any], initializers: Iterable[TensorProto], ends: tuple[Any, Any], path: Path
) -> None:
    """Write a model; ends = (inputs, outputs). What no output needs is left out."""
    inputs, outputs = ends
    needed = {o.name for o in outputs}
    kept = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:  # a loop's body reads names from outside
                needed.update(name for inner in attribute.g.node for name in inner.input)
    used = [t for t in initializers if t.name in needed]
    graph = helper.make_graph(kept[::-1], path.stem, inputs, outputs, used)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR), str(path))


def quantized(w: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Rows of w (n, k) as int8 in [-127, 127], and the scale (n,) of each: w = scale * int8."""
    scale = np.maximum(np.abs(w).max(1), 1e-12) / 127
    return np.rint(w / scale[:, None]).astype(np.int8), scale.astype(np.float32)
