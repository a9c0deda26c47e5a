"""The tokenizer of a policy trained here: byte-level BPE on its instructions and some common English.

Every byte has a token, so that no word is refused; common words beside the tasks' own are one or two tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<pad>", "<bos>", "<eos>")
_REPEATS = 20  # how much more an instruction counts than the sentences below

# Words of tables, robots and everyday requests: what people type that the tasks do not use.
_ENGLISH = (
    "please can you now go and then stop wait slowly quickly gently carefully again once more this that these those",
    "robot arm hand finger gripper wrist table box plate cup bowl ball bottle drawer door button shelf floor edge",
    "left right up down front back behind near far over under between beside above below centre corner middle",
    "open close hold drop place put give bring turn rotate lift raise lower press pull push slide stack sort wipe",
    "red green blue purple yellow orange pink white black brown grey small large big little long short first last",
    "the a an it its to of in on at from with into onto for is are was be do not no yes what which where one two three",
)


def train_tokenizer(directory: Path, instructions: Iterable[str], *, size: int) -> Tokenizer:
    """Write `directory`/tokenizer.json and return it.

    instructions: as they are tokenized, the line end at their end included. size: of the vocabulary, at most; 256
    bytes and the special tokens are in it. The same input gives the same file.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    known = sorted(set(instructions))
    tokenizer.train_from_iterator([*known * _REPEATS, *_ENGLISH], trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer
