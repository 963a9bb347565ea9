"""Texts as numbers of tokens: their bytes, or the pieces of a sentencepiece model. Token 0 is of no text."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.checked_files import read_bounded
from data_pipelines.extras import install_extra

TOKENS_NAME = "tokens.model"
"""Of the sentencepiece model in a shard set that has one."""
TOKENS_HASH = "tokens_sha256"
"""Fact of its manifest's writer: the SHA-256 of that file."""
MAX_BYTES = 1 << 26


class Tokens(Protocol):
    """Numbers of tokens to texts and back. `num_tokens`: how many there are."""

    num_tokens: int

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text in UTF-8."""

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens; bytes of a model need not be UTF-8."""


class Bytes:
    """A token a byte; methods as in `Tokens`."""

    num_tokens = 256

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return bytes(tokens)


class Pieces:
    """The pieces of a sentencepiece model, which spells in bytes what it does not know; as in `Tokens`."""

    def __init__(self, file: Path) -> None:
        self._processor: Any = _sentencepiece(f"data.tokens={file}").SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(read_bounded(file, MAX_BYTES))
        except RuntimeError as error:
            raise ValueError(
                f"{file}: expected a model of sentencepiece; `shards write tsv --vocabulary` trains one"
            ) from error
        self.num_tokens = int(self._processor.vocab_size())
        if self._processor.unk_id() != 0 or not any(map(self._processor.IsByte, range(self.num_tokens))):
            raise ValueError(f"{file}: expected token 0 to be the unknown one, and bytes for what it does not know")

    def encode(self, text: bytes) -> list[int]:
        return list(self._processor.EncodeAsIds(text.decode()))

    def decode(self, tokens: Sequence[int]) -> bytes:
        return str(self._processor.DecodeIds(list(tokens))).encode()


def tokens_of(file: str | None) -> Tokens:
    """The tokens of a sentencepiece model's file, or bytes. ValueError or OSError where the file is none."""
    return Bytes() if file is None else Pieces(Path(file))


def tokens_sha256(file: str | Path | None) -> str | None:
    """By which the tokens of a file are known again; None for bytes."""
    return None if file is None else hashlib.sha256(read_bounded(Path(file), MAX_BYTES)).hexdigest()


def train_pieces(texts: Iterable[str], vocabulary: int) -> bytes:
    """A sentencepiece model of `vocabulary` byte pairs of these texts; what it lacks it spells in bytes.

    ValueError where sentencepiece is missing, and where the texts give fewer pieces, or have more characters.
    """
    sentencepiece, made = _sentencepiece("a vocabulary"), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=made,
            vocab_size=vocabulary,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            bos_id=-1,
            eos_id=-1,
            # Its threads' sums come in any order, and pieces with them.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # Its advice names options of its own.
        reason = str(error).rpartition("] ")[2].partition(". Increase vocab_size")[0]
        raise ValueError(f"a vocabulary of {vocabulary:,} pieces: {reason or error}") from error
    return made.getvalue()


def _sentencepiece(asked: str) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(f"{asked} needs sentencepiece: {install_extra('text')}") from error
    return sentencepiece
