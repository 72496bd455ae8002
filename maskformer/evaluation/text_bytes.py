"""How many bytes of text a token stands for, so that models with different tokenizers compare in bits per byte.

The bytes of a split are those of its documents as they are, in UTF-8, white space and all. They are shared out over the
split's tokens in proportion to the bytes that each token decodes to. So the whole split has exactly its own bytes,
whatever the tokenizer folds, strips or cannot write, and a part of it has the share of the tokens in that part.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from maskformer.data import DataConfig, Tokenizer, load_dataset
from maskformer.data.sources import open_source

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNDECODABLE = "\ufffd"
_ROWS_AT_ONCE = 1024


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [2, vocabulary]: UTF-8 bytes that each token adds to the decoded text as the first one of a segment (row 0)
    and after another (row 1), where many tokenizers write a space before a word.

    Special tokens, and an unknown word, stand for no bytes of their own. A piece of a byte-level vocabulary may be part
    of a character: it counts its bytes.
    """
    table = np.zeros((2, len(tokenizer)), np.int32)
    special = set(tokenizer.vocabulary.special_ids)
    before = _word_before(tokenizer, special)
    begin = len(tokenizer.decode(before).encode())
    for token in range(len(tokenizer)):
        if token in special or (piece := _piece(tokenizer, token)) is None:
            continue
        text = tokenizer.decode([token])
        if _BYTE_PIECE.fullmatch(piece):
            table[:, token] = 1
        elif _UNDECODABLE in text and _UNDECODABLE not in piece:
            table[:, token] = len(piece)  # a byte-level alphabet writes each byte as one character
        else:
            table[0, token] = len(text.encode())
            table[1, token] = len(tokenizer.decode([*before, token]).encode()) - begin
    return table


def _piece(tokenizer: Tokenizer, token: int) -> str | None:
    try:
        return tokenizer.token(token)
    except ValueError:  # ids may have holes
        return None


def _word_before(tokenizer: Tokenizer, special: set[int]) -> list[int]:
    """A token of the vocabulary that decodes to letters or digits, of any script; none where there is no such token.

    Not to punctuation: decoders tidy up around it.
    """
    for token in range(len(tokenizer)):
        if token in special or (piece := _piece(tokenizer, token)) is None or _BYTE_PIECE.fullmatch(piece):
            continue
        if tokenizer.decode([token]).isalnum():
            return [token]
    return []


def bytes_of_tokens(table: jax.Array, tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Decoded bytes of every token of packed rows, int32 [batch, length]; 0 for padding.

    Args:
      table: from `token_bytes`. A token is the first of its segment when none before it stands for any bytes.
      tokens, segment_ids, positions: int [batch, length]; positions are 0 where a segment begins.
    """
    valid = segment_ids > 0
    written = valid & (table[0][tokens] > 0)
    earlier = jnp.cumsum(written, axis=1) - written
    begin = jax.lax.cummax(jnp.where(positions == 0, jnp.arange(tokens.shape[1]), 0), axis=1)
    first = earlier == jnp.take_along_axis(earlier, begin, axis=1)
    return jnp.where(valid, jnp.where(first, table[0][tokens], table[1][tokens]), 0)


@dataclasses.dataclass(frozen=True)
class SplitBytes:
    """The bytes of a split.

    Attributes:
      table: see `token_bytes`.
      text: bytes of its documents.
      decoded: bytes of what its tokens decode to.
    """

    table: np.ndarray
    text: int
    decoded: int

    def of(self, decoded: float) -> float:
        """Bytes of text behind tokens that decode to so many bytes."""
        return decoded * self.text / self.decoded


def bits_per_byte(name: str, nats: float, sums: Mapping[str, np.ndarray], split: SplitBytes) -> dict[str, float]:
    """`name`: nats over ln 2 and the bytes of text behind the tokens of `sums["decoded_bytes"]`; and those `bytes`.

    Left out where the tokens stand for no text at all.
    """
    size = split.of(float(sums["decoded_bytes"][0]))
    return {name: nats / math.log(2) / size, "bytes": size} if size > 0 else {}


def split_bytes(config: DataConfig, split: str, tokenizer: Tokenizer) -> SplitBytes:
    """Count the bytes of the whole split, whatever part of it is to be evaluated; reads its text once.

    Raises:
      ValueError: the tokenizer can write none of it.
    """
    table = token_bytes(tokenizer)
    on_device = jnp.asarray(table)
    rows = load_dataset(dataclasses.replace(config, max_rows=None), split, tokenizer).rows

    @jax.jit
    def count(tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.sum(bytes_of_tokens(on_device, tokens, segment_ids, positions), axis=1)

    decoded = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        # Filled up with rows of padding: one shape, one compilation.
        index = np.arange(start, start + _ROWS_AT_ONCE)
        batch = rows.read(np.where(index < len(rows), index, -1))
        decoded += int(np.sum(np.asarray(count(*(batch[k] for k in ("tokens", "segment_ids", "positions"))), np.int64)))
    if not decoded:
        raise ValueError(f"the tokenizer decodes the {split} split to nothing: bits per byte are not defined")
    return SplitBytes(table, open_source(config, split).text_bytes(), decoded)
