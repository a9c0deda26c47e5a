"""Reads the arm's STL files and makes them light enough for a processor to draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Triangles = npt.NDArray[np.int32]

_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_HEADER = 80  # bytes of a binary STL before the count of triangles


def read_stl(path: Path) -> npt.NDArray[np.float32]:
    """Corners (n, 3, 3) in metres of a binary STL file.

    Raises:
        ValueError: the file is shorter than it says.
    """
    data = path.read_bytes()
    count = int.from_bytes(data[_HEADER : _HEADER + 4], "little")
    if len(data) < _HEADER + 4 + count * _TRIANGLE.itemsize:
        raise ValueError(f"{path}: {len(data)} bytes for {count} triangles: the file is cut short")
    corners: npt.NDArray[np.float32] = np.frombuffer(data, _TRIANGLE, count, _HEADER + 4)["corners"]
    return corners


def decimate(corners: npt.NDArray[np.float32], cell: float) -> tuple[Points, Triangles]:
    """Vertices (v, 3) and faces (f, 3) of a surface whose corners (n, 3, 3) are merged by cubes of `cell` metres.

    Vertex clustering: the corners within one cube of a grid become their mean, and a triangle is kept when its
    three corners are in three cubes (Rossignac and Borrel, 1993).
    """
    flat = corners.reshape(-1, 3).astype(np.float64)
    keys = np.floor(flat / cell).astype(np.int64)
    keys -= keys.min(axis=0)
    _, cluster = np.unique(
        np.ravel_multi_index(tuple(keys.T), tuple(keys.max(axis=0) + 1)), return_inverse=True
    )
    counts = np.bincount(cluster)
    vertices = np.stack([np.bincount(cluster, flat[:, axis]) / counts for axis in range(3)], axis=1)
    faces = cluster.reshape(-1, 3)
    apart = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
    # A triangle starts at its smallest index, so that the same one is found twice whichever corner it began with.
    faces = faces[apart]
    turn = faces.argmin(axis=1)
    faces = np.take_along_axis(faces, (turn[:, None] + np.arange(3)) % 3, axis=1)
    faces = np.unique(faces, axis=0).astype(np.int32)
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(-1, 3).astype(np.int32)
