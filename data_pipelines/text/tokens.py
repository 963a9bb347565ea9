"""Texts as numbers of tokens: their bytes, or the pieces of a sentencepiece model. Token 0 is of no text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.checked_files import read_bounded
from data_pipelines.extras import install_extra


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
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(f"data.tokens={file} needs sentencepiece: {install_extra('text')}") from error
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(read_bounded(file, 1 << 26))
        except RuntimeError as error:
            raise ValueError(
                f"{file}: expected a model of sentencepiece; train one with its --byte_fallback"
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
