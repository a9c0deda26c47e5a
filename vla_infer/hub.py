"""Where a policy or a tokenizer is: a directory, or a repository in the local Hugging Face cache.

The cache is read with our own code: `<cache>/models--<org>--<name>/refs/<revision>` holds a commit, and
`snapshots/<commit>/` the files. Nothing is downloaded unless the caller asks for it. The standard variables
(HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME) only say where the cache is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from vla_infer.errors import CheckpointError
from vla_infer.json_io import show

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_POLICY_FILES = ["*.json", "*.safetensors", "tokenizer/*"]


def is_repo_id(name: str) -> bool:
    """True for `org/name` as the Hugging Face hub writes it."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name


def cache_directory() -> Path:
    """The Hugging Face hub cache of this user."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def find_in_cache(repo_id: str, revision: str = "main") -> Path | None:
    """The snapshot directory of a cached repository, or None.

    `revision` is a branch or tag that was downloaded under that name, or a full commit.
    """
    if not is_repo_id(repo_id) or _REVISION.fullmatch(revision) is None:
        return None
    root = cache_directory() / ("models--" + repo_id.replace("/", "--"))
    try:
        with (root / "refs" / revision).open("rb") as file:
            commit = file.read(200).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision
    if _REVISION.fullmatch(commit) is None:
        return None
    snapshot = root / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def find_policy(path: str | Path, *, revision: str = "main", download: bool = False) -> Path:
    """The directory of a policy given as a directory or as a hub id.

    Args:
        path: a directory, or `org/name`.
        revision: branch, tag or commit of a hub id.
        download: fetch a hub id that is not in the cache; needs the `huggingface_hub` package.

    Raises:
        CheckpointError: nothing is there; the message says how to get it.
    """
    name = str(path)
    try:
        if Path(path).is_dir():
            return Path(path)
        if Path(path).exists():
            raise CheckpointError(
                f"{path}: expected a policy directory, got a file; give the directory it is in"
            )
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{show(name)}: not a usable path ({err})") from None
    if not is_repo_id(name):
        raise CheckpointError(f"{show(name)}: no such directory")
    cached = find_in_cache(name, revision)
    if cached is not None:
        return cached
    if download:
        return _download(name, revision)
    raise CheckpointError(
        f"{name}: no such directory, and not in the Hugging Face cache ({cache_directory()}, revision "
        f"{revision}); get it with: hf download {name} --revision {revision}"
    )


def _download(repo_id: str, revision: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repo_id}: downloading needs huggingface_hub; install it with: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_POLICY_FILES))
    except Exception as err:  # the client raises errors of several libraries
        reason = " ".join(str(err).split())[:300]
        raise CheckpointError(f"{repo_id}: download failed ({type(err).__name__}: {reason})") from None
