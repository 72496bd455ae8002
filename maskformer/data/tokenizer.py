"""Tokens and words: trains or loads a tokenizer, and keeps track of where words begin."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from maskformer import paths
from maskformer.checks import printable, shown
from maskformer.data.cache import build_once, cache_dir, content_key
from maskformer.data.data_config import DataConfig, DataError
from maskformer.data.reserved import unreachable
from maskformer.data.sources import open_source
from maskformer.objectives.vocabulary import Vocabulary
from maskformer.paths import AnyPath
from maskformer.textfiles import parse_json, read_text, suffix, unreadable

DEFAULT_VOCABULARY_SIZE = 8192
# Raise it when training changes, so that nothing made before is taken for current.
_VERSION = 2
# A table of embeddings has a row for every id up to the largest; beyond this a file is damaged, not large.
_LARGEST_ID = (1 << 24) - 1
# Trainers take time with the square of a word's length. SentencePiece's own leaves longer lines out.
_LONGEST_LEARNED = 4096
_TRIED = 1000  # pieces among which there is a letter of the vocabulary's script
_LONG_WORD = re.compile(rf"(?<!\S)\S{{{_LONGEST_LEARNED + 1},}}+")
# The names under which published tokenizers have these tokens; the first one present counts.
_NAMES = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("[BOS]", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("[EOS]", "</s>", "<eos>", "<|endoftext|>"),
}
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_INSIDE_WORD = re.compile(r"(?<=\S)\S")


class Tokenizer:
    """Text to ids and back, with word boundaries.

    Attributes:
      vocabulary: the special ids, for the objectives.
      fingerprint: SHA-256 of what decides the ids.
    """

    def __init__(self, definition: str):
        """`definition` is the content of a `tokenizer.json`."""
        settings = json.loads(definition)
        # Padding and truncation belong to packing, and a template would add special tokens a second time.
        settings.update(padding=None, truncation=None, post_processor=None)
        definition = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        self._definition = definition
        self._with_specials = Backend.from_str(definition)
        self.fingerprint = _sha256(definition)
        self.vocabulary = _vocabulary(self._with_specials)
        self._reserved = frozenset(self.vocabulary.special_ids) - {self.vocabulary.unk}
        names = {piece for piece, token in self._with_specials.get_vocab().items() if token in self._reserved}
        # For corpus text: one that spells out "[MASK]", in whatever letters, must not turn into the token.
        self._plain = Backend.from_str(json.dumps(unreachable(settings, names)))
        self._plain.encode_special_tokens = True
        # Without a pre-tokenizer that cuts at spaces every text is one "word" to the library, and the marks on the
        # pieces have to tell.
        self._word_start_of_id = None if self._cuts_at_spaces() else self._marked_pieces()

    def __len__(self) -> int:
        return self.vocabulary.size

    def _cuts_at_spaces(self) -> bool:
        """Whether the pre-tokenizer parts words, tried on a letter of the vocabulary's own script."""
        cut = self._with_specials.pre_tokenizer
        if cut is None:
            return False
        tokens = sorted(set(self._with_specials.get_vocab().values()) - set(self.vocabulary.special_ids))
        visible = [c for token in tokens[:_TRIED] for c in self.decode([token]) if not c.isspace()]
        letter = next(filter(str.isalpha, visible), visible[0] if visible else None)
        if letter is None:
            return False
        text = f"{letter} {letter}"
        if (normalizer := self._with_specials.normalizer) is not None:
            text = normalizer.normalize_str(text)
        return len(cut.pre_tokenize_str(text)) > 1

    def _marked_pieces(self) -> np.ndarray:
        marked = np.zeros(self.vocabulary.size, bool)
        for piece, token in self._with_specials.get_vocab().items():
            marked[token] = piece.startswith(("\u2581", "\u0120"))
        return marked

    def encode_texts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encodes corpus text: no special token is added, and none is read from the text.

        Returns:
          For each text `(tokens int32 [n], word_starts bool [n])`; True at the first piece of each word.
        """
        encodings = _encoded(self._plain.encode_batch, list(texts))
        return [(self._without_reserved(np.array(e.ids, np.int32)), self._word_starts(e)) for e in encodings]

    def _without_reserved(self, tokens: np.ndarray) -> np.ndarray:
        """What a model writes for a text that it does not know may be a token that is reserved for something else."""
        if self._reserved.isdisjoint(tokens.tolist()):
            return tokens
        found = np.isin(tokens, list(self._reserved))
        if self.vocabulary.unk is None:
            raise DataError(
                f"the tokenizer writes {self.token(tokens[found][0])} for text that it does not know;"
                " give it an [UNK] token of its own"
            )
        return np.where(found, self.vocabulary.unk, tokens).astype(np.int32)

    def encode(
        self, text: str, *, start_token: str | None = None, end_token: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a text written for a model, where `[MASK]` (or the tokenizer's own name) is the mask token.

        Args:
          text: may contain special tokens by name.
          start_token, end_token: added around it; None adds nothing.

        Returns:
          `(tokens int32 [n], word_starts bool [n])`; special tokens start no word.

        Raises:
          DataError: the text has `[MASK]` and the tokenizer no mask token, or an added token is unknown.
        """
        if "[MASK]" in text:
            if self.vocabulary.mask is None:
                raise DataError("the text has [MASK] and the tokenizer no mask token; load one that has")
            text = text.replace("[MASK]", self.token(self.vocabulary.mask))
        (encoding,) = _encoded(self._with_specials.encode_batch, [text])
        tokens, words = np.array(encoding.ids, np.int32), self._word_starts(encoding)
        words &= ~np.isin(tokens, self.vocabulary.special_ids) | (tokens == self.vocabulary.unk)
        before, after = (
            np.array([] if name is None else [self.token_id(name)], np.int32) for name in (start_token, end_token)
        )
        return (
            np.concatenate([before, tokens, after]),
            np.concatenate([np.zeros(len(before), bool), words, np.zeros(len(after), bool)]),
        )

    def decode(self, tokens: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Readable text of `tokens`: pieces joined into words; special tokens left out, or shown by name."""
        return self._with_specials.decode([int(t) for t in tokens], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str:
        """The piece with this id, such as `##ing`."""
        piece = self._with_specials.id_to_token(int(token_id))
        if piece is None:
            raise DataError(f"token id {int(token_id)}: the tokenizer has no such id, its size is {len(self)}")
        return piece

    def token_id(self, name: str) -> int:
        """The id of a piece.

        Raises:
          DataError: the tokenizer has no such piece.
        """
        found = self._with_specials.token_to_id(name)
        if found is None:
            specials = ", ".join(self.token(i) for i in self.vocabulary.special_ids) or "none"
            raise DataError(f"the tokenizer has no token {name!r}; its special tokens are {specials}")
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`, which `tokenizer=<path>` and the `tokenizers` library read."""
        Path(path).write_text(self._definition, encoding="utf-8")

    def _word_starts(self, encoding: tokenizers.Encoding) -> np.ndarray:
        ids = encoding.ids
        if not ids:
            return np.zeros(0, bool)
        if self._word_start_of_id is not None:
            starts = self._word_start_of_id[ids]
            starts[0] = True
            return starts
        # Added tokens have no word (None); `-1` sets the first piece apart from all of them.
        words = np.array([-1, *(-2 if w is None else w for w in encoding.word_ids)])
        return words[1:] != words[:-1]


def _encoded(encode_batch: Callable[..., list[tokenizers.Encoding]], texts: list[str]) -> list[tokenizers.Encoding]:
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise DataError(f"the tokenizer cannot encode the text ({reason}); give it an [UNK] token") from None


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `config` names: read from its file, or trained on the train split and cached.

    Training is deterministic. The cache is keyed by the content of the corpus, the settings and the version of
    the `tokenizers` library.

    Raises:
      DataError: the file is missing or no tokenizer, or the data cannot be read.
    """
    if not config.trains_tokenizer:
        if (why := paths.why_no_folder(config.tokenizer)) is not None:
            raise DataError(f"data.tokenizer={shown(config.tokenizer)}: {why}")
        return _read(paths.given(config.tokenizer), config.lowercase)
    source = open_source(config, "train")
    size = config.vocabulary_size or DEFAULT_VOCABULARY_SIZE
    lowercase = config.tokenizer == "wordpiece" if config.lowercase is None else config.lowercase
    key = content_key(
        version=_VERSION,
        library=tokenizers.__version__,
        corpus=source.fingerprint,
        kind=config.tokenizer,
        size=size,
        lowercase=lowercase,
        sentinels=config.sentinels,
    )

    def build(path: Path) -> None:
        definition = train(config.tokenizer, source.documents, size, lowercase, config.sentinels)
        path.write_text(json.dumps({"definition": definition, "sha256": _sha256(definition)}), encoding="utf-8")

    path = build_once(cache_dir() / "tokenizers" / f"{key}.json", lambda path: _cached(path) is not None, build)
    return Tokenizer(_cached(path) or "")


def train(kind: str, documents: Callable[[], Iterator[str]], size: int, lowercase: bool, sentinels: int = 0) -> str:
    """Trains a tokenizer and returns its definition (a `tokenizer.json`).

    Ids: `[PAD] [UNK] [CLS] [SEP] [MASK]` are 0 to 4, then the pieces, then the sentinels, of which
    `<extra_id_0>` is the last id (T5's order).

    Args:
      kind: `wordpiece`, `bpe` (byte-level) or `unigram`.
      documents: starts a pass over the text to learn from; it may be called twice. A run of over 4,096 characters
        without white space is learned from as several words.
      size: number of ids, special tokens and sentinels included; fewer where the text is too small for as many.
      lowercase: fold case and accents.
      sentinels: number of `<extra_id_i>` tokens.
    """
    learned = size - sentinels

    def bounded() -> Iterator[str]:
        return (_LONG_WORD.sub(_in_pieces, text) for text in documents())

    trainer = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram}[kind]
    backend = trainer(bounded, learned, lowercase)
    if backend.get_vocab_size() > learned:
        raise _too_small(size)
    for name in _SPECIAL:
        # " [MASK]" after a word is one token: the tokenizers whose pieces carry the space must not leave it alone.
        absorbs_space = name == "[MASK]" and kind != "wordpiece"
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False, lstrip=absorbs_space)])
    for i in reversed(range(sentinels)):
        backend.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True, normalized=False)])
    return backend.to_str()


def _in_pieces(word: re.Match[str]) -> str:
    letters = word[0]
    return " ".join(letters[i : i + _LONGEST_LEARNED] for i in range(0, len(letters), _LONGEST_LEARNED))


def _too_small(size: int) -> DataError:
    return DataError(f"data.vocabulary_size={size}: too small for the characters of the corpus alone; raise it")


def _train_wordpiece(documents: Callable[[], Iterator[str]], size: int, lowercase: bool) -> Backend:
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()

    def normalized() -> Iterator[str]:
        return (normalizer.normalize_str(text) for text in documents())

    # Rare characters would crowd out words; a word that holds one becomes [UNK].
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for text in normalized():
        counts.update(c for c in text if not c.isspace())
        inside.update(_INSIDE_WORD.findall(text))
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    kept = set(ranked[: max(size // 4, 1)])
    rare = str.maketrans({c: " " for c in ranked if c not in kept})
    # The trainer numbers the `##` characters in the order of a randomly seeded hash table and breaks ties by
    # number. Naming them in advance, in sorted order, makes it deterministic; they are ordinary pieces below.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[*_SPECIAL, *(f"##{c}" for c in sorted(inside & kept) if not _is_punctuation(c))],
    )
    scratch = Backend(models.WordPiece(unk_token="[UNK]"))
    scratch.pre_tokenizer = pre_tokenizer
    scratch.train_from_iterator((text.translate(rare) for text in normalized()), trainer)
    backend = Backend(models.WordPiece(scratch.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _train_bpe(documents: Callable[[], Iterator[str]], size: int, lowercase: bool) -> Backend:
    backend = Backend(models.BPE())
    if lowercase:
        backend.normalizer = _fold()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(documents(), trainer)
    return backend


def _train_unigram(documents: Callable[[], Iterator[str]], size: int, lowercase: bool) -> Backend:
    scratch = Backend(models.Unigram())
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    scratch.normalizer = normalizers.Sequence([normalizers.NFKC(), one_space, *([_fold()] if lowercase else [])])
    scratch.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False, special_tokens=_SPECIAL, unk_token="[UNK]")
    try:
        scratch.train_from_iterator(documents(), trainer)
    except Exception as error:  # the library raises bare Exception
        if "vocabulary is not large enough" in str(error):
            raise _too_small(size) from None
        raise
    scores = _reproducible_scores(json.loads(scratch.to_str())["model"]["vocab"])
    pieces = sorted((p for p in scores if p not in _SPECIAL), key=lambda p: (-scores[p], p))
    vocabulary = [(p, 0.0) for p in _SPECIAL] + [(p, scores[p]) for p in pieces]
    backend = Backend(models.Unigram(vocabulary, unk_id=_SPECIAL.index("[UNK]")))
    backend.normalizer, backend.pre_tokenizer = scratch.normalizer, scratch.pre_tokenizer
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


def _reproducible_scores(vocabulary: list[tuple[str, float]]) -> dict[str, float]:
    """Undoes two effects of the trainer's randomly seeded hash tables, which differ from run to run.

    The last digits of the scores depend on the order of additions; they are rounded off. And the characters that
    are pieces only so that every text can be written get the lowest score plus 0, 0.0001, 0.0002 ... in random
    order; all of that ladder is given its lowest rung.
    """
    scores = {piece: round(score, 6) for piece, score in vocabulary}
    characters = sorted((p for p in scores if len(p) == 1), key=scores.get)  # type: ignore[arg-type]
    rung = scores[characters[0]] if characters else 0.0
    lowest = rung
    for character in characters:
        if scores[character] > rung + 0.000105:
            break
        rung, scores[character] = scores[character], lowest
    return scores


def _fold() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])


def _is_punctuation(character: str) -> bool:
    """As BERT's pre-tokenizer sees it: these are always words of their own."""
    return unicodedata.category(character).startswith("P") or character in "$+<=>^`|~"


def _read(path: AnyPath, lowercase: bool | None) -> Tokenizer:
    where = f"data.tokenizer='{printable(path)}'"
    try:
        exists = path.exists()
    except OSError as error:
        raise unreadable(where, error) from None
    if not exists:
        raise DataError(f"{where}: No such file or directory; give the path of a tokenizer.json or vocab.txt")
    try:
        text = read_text(path)
    except DataError as error:
        raise DataError(f"data.tokenizer: {error}") from None
    definition = _checked_definition(text, where) if suffix(path) == ".json" else _wordpiece(text, where, lowercase)
    try:
        return Tokenizer(definition)
    except ValueError as error:  # special ids that contradict each other
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0]
        raise DataError(f"{where}: no definition of the tokenizers library ({reason})") from None


def _checked_definition(text: str, where: str) -> str:
    settings = parse_json(text, where)
    if not isinstance(settings, dict):
        raise DataError(
            f"{where}: no definition of the tokenizers library (found {type(settings).__name__}, expected an object);"
            " save one with Tokenizer.save"
        )
    # Before the library sees them: it goes through all the numbers up to the largest.
    if (largest := max(_ids(settings), default=0)) > _LARGEST_ID:
        raise DataError(
            f"{where}: has the id {shown(largest)}, expected at most {_LARGEST_ID}; number the tokens from 0 on"
        )
    return text


def _ids(settings: dict[str, Any]) -> Iterator[int]:
    """The ids in the value of a `tokenizer.json`, which may be nothing of the kind."""
    model, added = settings.get("model"), settings.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    values = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    values += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return (value for value in values if isinstance(value, int))


def _wordpiece(text: str, where: str, lowercase: bool | None) -> str:
    pieces = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if "[UNK]" not in pieces:
        raise DataError(f"{where}: no line [UNK]; expected a WordPiece vocabulary, one piece a line")
    backend = Backend(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase is not False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    present = [name for name in _SPECIAL if name in pieces]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in present])
    return backend.to_str()


def _cached(path: Path) -> str | None:
    """The definition in a file of the cache; None where the file is not what was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        definition = content["definition"]
        return definition if content["sha256"] == _sha256(definition) else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _vocabulary(backend: Backend) -> Vocabulary:
    named = {}
    for field, names in _NAMES.items():
        named[field] = next((i for i in map(backend.token_to_id, names) if i is not None), None)
    sentinels = []
    while (token := backend.token_to_id(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(token)
    added = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    others = added - set(named.values()) - set(sentinels)
    # Ids may have holes, and a table of embeddings needs the highest.
    size = max(backend.get_vocab().values(), default=-1) + 1
    return Vocabulary(size=size, **named, sentinels=tuple(sentinels), special=tuple(sorted(others)))
