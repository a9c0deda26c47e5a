"""Typed errors. Each message is one line: what, where, expected, got, and the mend."""

from __future__ import annotations


class VlaInferError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(VlaInferError):
    """A policy directory that cannot be loaded: missing file, wrong name, shape, dtype or value."""


class ContractError(VlaInferError):
    """A robot contract that is not valid, or does not fit the policy."""


class ObservationError(VlaInferError):
    """One observation that cannot be used: encoding, size, joint names, not finite."""


class UnsupportedError(VlaInferError):
    """Something the checkpoint or the caller asks for that this version does not do."""


class EngineError(VlaInferError):
    """The engine failed while planning or running a tape."""


class DeviceLostError(EngineError):
    """The device is gone (a GPU off the bus, a context that only reports errors): no further try can succeed."""


class ReplayError(VlaInferError):
    """A recording that cannot be replayed, or a report that cannot be read or compared."""


class TrainingError(VlaInferError):
    """Demonstrations or a training state that are missing, or that do not fit what is asked for."""
