"""LeRobot datasets (v2.1 and v3.0) episode by episode: states, actions, task and decoded camera frames.

Layouts as `meta/info.json` names them. v2.1: one parquet file and one video a camera for each episode, tasks and
episodes as JSON lines. v3.0: several episodes in a file, where each begins is in `meta/episodes/**.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vla_infer.contract_parse import one_line
from vla_infer.errors import ReplayError

FloatArray = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]
VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True, eq=False)
class Step:
    """One row of a dataset. time: s since the episode's start; images: uint8 (H, W, 3) RGB by feature."""

    time: float
    state: FloatArray
    action: FloatArray
    images: dict[str, Pixels]


class Dataset:
    """A dataset directory. Raises ReplayError, on one line, for what is missing or of another layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        info = _json(root / "meta" / "info.json")
        self.version = str(info.get("codebase_version"))
        if self.version not in VERSIONS:
            raise ReplayError(
                f"{root}: codebase_version is {self.version}; expected one of {', '.join(VERSIONS)}"
            )
        try:
            self.fps = float(info["fps"])
            self.episodes = int(info["total_episodes"])
            self._features: dict[str, dict[str, Any]] = dict(info["features"])
            self._data_path, self._video_path = str(info["data_path"]), info.get("video_path")
            self.state_names = _names(self._features, "observation.state")
            self.action_names = _names(self._features, "action")
        except (KeyError, TypeError, ValueError) as error:
            raise ReplayError(f"{root}/meta/info.json: {one_line(error)} is missing or wrong") from error
        self._chunk_size = int(info.get("chunks_size", 1000))
        kinds = {name: feature.get("dtype") for name, feature in self._features.items()}
        self.cameras = tuple(
            name for name, kind in kinds.items() if kind in ("video", "image") and not self._is_depth(name)
        )
        self._videos = tuple(name for name in self.cameras if kinds[name] == "video")
        if not self.fps > 0 or not self.cameras:
            raise ReplayError(f"{root}: expected fps above 0 and a camera, got {self.fps} and {self.cameras}")

    def _is_depth(self, name: str) -> bool:
        feature = self._features[name]
        info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
        return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))

    def steps(self, episode: int) -> tuple[str, Iterator[Step]]:
        """The task of an episode and its rows in order, the videos being decoded as they are read."""
        if not 0 <= episode < self.episodes:
            raise ReplayError(f"{self.root}: episode {episode}: expected 0 to {self.episodes - 1}")
        place = self._place(episode)
        table = _parquet(self.root / self._data_path.format(**place), episode)
        if not table["time"].size:
            raise ReplayError(f"{self.root}: episode {episode} has no rows")
        return self._task(int(table["task"][0]), place), self._rows(table, place)

    def _rows(self, table: dict[str, Any], place: dict[str, Any]) -> Iterator[Step]:
        videos = {
            name: frames(
                self.root
                / str(self._video_path).format(**{**place, **place.get(name, {}), "video_key": name}),
                start=place.get(name, {}).get("start", 0.0),
                fps=self.fps,
            )
            for name in self._videos
        }
        still = [name for name in self.cameras if name not in videos]
        for row in range(table["time"].size):
            images = {name: _decode(table[name][row], self.root) for name in still}
            for name, source in videos.items():
                image = next(source, None)
                if image is None:
                    raise ReplayError(f"{self.root}: the video of {name} ends at row {row} of the episode")
                images[name] = image
            yield Step(float(table["time"][row]), table["state"][row], table["action"][row], images)

    # ------------------------------------------------------------------ places
    def _place(self, episode: int) -> dict[str, Any]:
        """The fields of the paths of an episode, and by camera those of its video with `start` (s)."""
        if self.version != "v3.0":
            return {"episode_index": episode, "episode_chunk": episode // self._chunk_size}
        for file in sorted((self.root / "meta" / "episodes").rglob("*.parquet")):
            for row in _read(file, None).to_pylist():
                if row["episode_index"] == episode:
                    return self._place_of_row(row)
        raise ReplayError(f"{self.root}/meta/episodes: there is no episode {episode}")

    def _place_of_row(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            place: dict[str, Any] = {
                "chunk_index": row["data/chunk_index"],
                "file_index": row["data/file_index"],
            }
            for name in self._videos:
                place[name] = {
                    "chunk_index": row[f"videos/{name}/chunk_index"],
                    "file_index": row[f"videos/{name}/file_index"],
                    "start": float(row[f"videos/{name}/from_timestamp"]),
                }
        except KeyError as error:
            raise ReplayError(f"{self.root}/meta/episodes: column {error} is missing") from error
        return place

    def _task(self, index: int, place: dict[str, Any]) -> str:
        if self.version == "v3.0":
            table = _read(self.root / "meta" / "tasks.parquet", None).to_pydict()
            # pandas keeps the text as the index, whose column has this name where it was given none.
            texts = table.get("task", table.get("__index_level_0__", []))
            found = dict(zip(table["task_index"], texts, strict=False))
        else:
            lines = (self.root / "meta" / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
            found = {row["task_index"]: row["task"] for row in map(json.loads, filter(None, lines))}
        return str(found.get(index, ""))


def frames(path: Path, *, start: float, fps: float) -> Iterator[Pixels]:
    """The frames of a video from `start` (s) on, RGB. Raises ReplayError for what is no video."""
    try:
        import av  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ReplayError(
            f"{path}: reading videos needs PyAV; pip install 'vla_infer[lerobot]' (or av)"
        ) from error
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if start > 1.0:
                container.seek(int((start - 0.5) / float(stream.time_base or 1)), stream=stream)
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= start - 0.5 / fps:
                    yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise ReplayError(f"{path}: cannot be decoded ({one_line(error, limit=120)})") from error


def _parquet(path: Path, episode: int) -> dict[str, Any]:
    """Columns of one episode: time (s), state and action (rows, n), task, and images stored in the table."""
    table = _read(path, episode)
    columns = table.to_pydict()
    try:
        found: dict[str, Any] = {
            "time": np.array(columns["timestamp"], np.float64),
            "state": np.array(columns["observation.state"], np.float64),
            "action": np.array(columns["action"], np.float64),
            "task": columns["task_index"],
        }
    except KeyError as error:
        raise ReplayError(f"{path}: column {error} is missing") from error
    found["time"] -= found["time"][0] if found["time"].size else 0.0
    return {**columns, **found}


def _read(path: Path, episode: int | None) -> Any:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise ReplayError(
            f"{path}: reading parquet needs pyarrow; pip install 'vla_infer[lerobot]' (or pyarrow)"
        ) from error
    try:
        # Only this episode's rows are kept: a file of v3.0 holds many.
        return parquet.read_table(
            path, filters=None if episode is None else [("episode_index", "=", episode)]
        )
    except (OSError, ArrowException) as error:
        raise ReplayError(f"{path}: cannot be read ({one_line(error, limit=120)})") from error


def _decode(cell: Any, root: Path) -> Pixels:
    """An image stored in the table as {bytes, path}."""
    data = (cell or {}).get("bytes")
    image = None if not data else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ReplayError(f"{root}: an image in the table is empty or not PNG nor JPEG")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _names(features: dict[str, dict[str, Any]], feature: str) -> tuple[str, ...]:
    """Names of the numbers of a feature: a list, or one in a mapping; else numbered."""
    entry = features[feature]
    names: Any = entry.get("names")
    if isinstance(names, dict):
        names = next((value for value in names.values() if isinstance(value, list)), None)
    size = int(entry["shape"][0])
    if not isinstance(names, list) or len(names) != size or len(set(names)) != size:
        return tuple(f"{feature.rsplit('.', 1)[-1]}_{i}" for i in range(size))
    return tuple(str(name).removesuffix(".pos") for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise ReplayError(f"{path}: cannot be read ({reason}); expected a LeRobot dataset") from error
    if not isinstance(loaded, dict):
        raise ReplayError(f"{path}: expected a JSON object")
    return loaded
