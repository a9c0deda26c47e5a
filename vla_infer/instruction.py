"""Instruction hygiene: what of an operator's text reaches the policy's prompt.

For every policy family (`clean_instruction`):

- it is a str of at most `MAX_INSTRUCTION_CHARS` characters, else ObservationError;
- white-space control characters (tab, line breaks, vertical tab, form feed, Unicode line and paragraph
  separators) become one space each; line breaks at its end are dropped, since every family's prompt step sets
  its own;
- other control characters, lone surrogates, private-use and unassigned code points are refused with
  ObservationError; invisible format characters (zero-width and bidirectional marks, soft hyphens, tags) are
  dropped, except the zero-width joiners that some scripts and emoji need;
- text that spells a special token of the tokenizer ("<eos>", "<image>") is tokenized as ordinary text
  (`vla_infer.tokenizer`).

For π0.5, whose prompt holds the robot's state as text (`neutralize_markers`): underscores become spaces, and
a colon after "task", "state" or "action" becomes a space, so that no instruction can open a field of the
prompt. Instructions without such things are passed unchanged.
"""

from __future__ import annotations

import re
import unicodedata

from vla_infer.errors import ObservationError
from vla_infer.json_io import show

#: About 200 words; the policies' prompts hold 48 to 200 tokens.
MAX_INSTRUCTION_CHARS = 1024

_SPACES = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029")
_JOINERS = frozenset("\u200c\u200d")
_COLONS = ":\u02d0\u02f8\u0589\u05c3\u2236\ua789\ufe13\ufe30\ufe55\uff1a"
_MARKER = re.compile(rf"(task|state|action)(?:[\s\u200c\u200d]*[{_COLONS}])+", re.IGNORECASE)


def clean_instruction(task: object) -> str:
    """The instruction as every family may use it; see the module's description for the rules.

    Raises:
        ObservationError: not a str, too long, or holding characters that are refused.
    """
    if not isinstance(task, str):
        raise ObservationError(f"instruction: expected a str, got {type(task).__name__}")
    if len(task) > MAX_INSTRUCTION_CHARS:
        raise ObservationError(f"instruction: {len(task)} characters, at most {MAX_INSTRUCTION_CHARS}")
    if task.isascii() and task.isprintable():
        return task
    kept = [_clean_char(char, position) for position, char in enumerate(task.rstrip("\r\n"))]
    return "".join(kept)


def _clean_char(char: str, position: int) -> str:
    if char in _SPACES:
        return " "
    category = unicodedata.category(char)
    if category == "Cf":
        return char if char in _JOINERS else ""
    if category[0] == "C":
        raise ObservationError(f"instruction: character {show(char)} at {position} is not text; remove it")
    return char


def neutralize_markers(task: str) -> str:
    """An instruction for π0.5's "Task: …, State: …;\\nAction: " prompt, unable to forge a field of it."""
    return _MARKER.sub(lambda match: match[1] + " ", task.strip().replace("_", " "))


def check_allowed(task: str, allowed: tuple[str, ...]) -> None:
    """Raise ObservationError for a cleaned instruction that is not among `allowed`; empty allows any."""
    if allowed and task not in allowed:
        raise ObservationError(
            f"instruction {show(task)} is not one of the {len(allowed)} that the contract allows"
        )
