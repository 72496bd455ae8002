"""Tokenizers are reproducible, reversible, mark words, and tell special tokens from text that spells them."""

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from maskformer.data import DataConfig, DataError, load_tokenizer
from maskformer.data.tokenizer import Tokenizer, train
from maskformer.objectives.vocabulary import Vocabulary

KINDS = ("wordpiece", "bpe", "unigram")
TEXT = "She walked, not unhappy; she WALKS every evening. Happiness might be never-ending!"


@pytest.fixture(scope="module")
def documents(folder):
    return [path.read_text() for path in sorted((folder / "train").iterdir())] + [TEXT]


@pytest.fixture(scope="module")
def trained(documents):
    return {kind: Tokenizer(train(kind, lambda: iter(documents), 400, lowercase=False)) for kind in KINDS}


def _pieces(tokenizer, text):
    tokens, starts = tokenizer.encode_texts([text])[0]
    return [tokenizer.token(t) for t in tokens], starts.tolist()


def _words(tokenizer, text):
    """Pieces grouped by the word starts."""
    grouped = []
    for piece, start in zip(*_pieces(tokenizer, text), strict=True):
        if start:
            grouped.append("")
        grouped[-1] += piece.removeprefix("##").strip("\u2581\u0120")
    return grouped


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_the_first_ids_and_sentinels_the_last(documents, kind):
    tokenizer = Tokenizer(train(kind, lambda: iter(documents), 400, lowercase=True, sentinels=3))
    size = len(tokenizer)
    assert tokenizer.vocabulary == Vocabulary(
        size=size, pad=0, unk=1, cls=2, sep=3, mask=4, sentinels=(size - 1, size - 2, size - 3)
    )
    assert size <= 400 and tokenizer.token(size - 1) == "<extra_id_0>"


def test_every_piece_of_a_trained_vocabulary_has_one_id(trained):
    for tokenizer in trained.values():
        ids = list(range(len(tokenizer)))
        assert [tokenizer.token_id(tokenizer.token(i)) for i in ids] == ids


def test_training_gives_the_same_tokenizers_in_every_process(folder):
    code = f"""
from pathlib import Path
from maskformer.data.tokenizer import Tokenizer, train
documents = [path.read_text() for path in sorted(Path({str(folder)!r}, "train").iterdir())]
for kind in {KINDS}:
    print(Tokenizer(train(kind, lambda: iter(documents), 300, lowercase=True)).fingerprint)
"""
    # The library's hash tables are seeded per process, so one process cannot see the fault.
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {tuple(run.communicate()[0].split()) for run in runs}
    assert len(found) == 1 and len(set(*found)) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_words_start_where_the_text_has_them(trained, kind):
    assert _words(trained[kind], "She walked unhappily every evening") == "She walked unhappily every evening".split()


def test_punctuation_is_a_word_where_the_tokenizer_separates_it(trained):
    assert _words(trained["wordpiece"], "evening. She") == ["evening", ".", "She"]
    assert _words(trained["bpe"], "evening. She") == ["evening", ".", "She"]
    # SentencePiece's words are what stands between spaces.
    assert _words(trained["unigram"], "evening. She") == ["evening.", "She"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_decoding_gives_the_text_back(trained, kind):
    tokens, _ = trained[kind].encode_texts([TEXT])[0]
    assert trained[kind].decode(tokens) == TEXT


def test_decoding_wordpiece_gives_readable_text(documents):
    tokenizer = Tokenizer(train("wordpiece", lambda: iter(documents), 400, lowercase=True))
    tokens, _ = tokenizer.encode_texts(["She walked, NOT unhappily. Every evening!"])[0]
    assert tokenizer.decode(tokens) == "she walked, not unhappily. every evening!"


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_that_spells_a_special_token_does_not_get_one(trained, kind):
    tokens, starts = trained[kind].encode_texts(["she [MASK] walked [SEP]"])[0]
    assert not {2, 3, 4} & set(tokens.tolist())
    assert starts[0] and len(starts) == len(tokens)
    if kind == "bpe":
        assert trained[kind].decode(tokens) == "she [MASK] walked [SEP]"


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_mask_is_one_token_that_starts_no_word(trained, kind):
    tokenizer = trained[kind]
    tokens, starts = tokenizer.encode("She walked every [MASK], unhappy", start_token="[CLS]", end_token="[SEP]")
    assert (tokens[0], tokens[-1]) == (2, 3) and (tokens == 4).sum() == 1
    assert not starts[np.isin(tokens, [2, 3, 4])].any()
    # The text on either side is what it is without the mask.
    before, _ = tokenizer.encode("She walked every")
    place = int(np.flatnonzero(tokens == 4)[0])
    assert tokens[1:place].tolist() == before.tolist()
    assert tokenizer.token(tokens[place + 1]) == ","
    shown = tokenizer.decode(tokens, skip_special=False)
    assert "[MASK], unhappy" in shown and "[MASK]" not in tokenizer.decode(tokens)


def test_an_unknown_word_is_a_word(trained):
    assert _pieces(trained["wordpiece"], "she \u6f22 walked") == (["she", "[UNK]", "walked"], [True] * 3)


def test_rare_characters_do_not_crowd_out_words(cache):
    strange = "".join(chr(c) for c in range(0x400, 0x800) if chr(c).isalpha())
    text = ["she walked " * 50 + strange]
    tokenizer = Tokenizer(train("wordpiece", lambda: iter(text), 100, lowercase=True))
    assert len(tokenizer) <= 100 and tokenizer.token_id("walked")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_as_the_same(trained, kind, tmp_path):
    trained[kind].save(tmp_path / "tokenizer.json")
    again = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert again.fingerprint == trained[kind].fingerprint and again.vocabulary == trained[kind].vocabulary


def test_a_vocab_txt_is_read_as_bert_reads_it(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##happ", "##y"]
    pieces += ["caf\u00e9", "cafe", "!", "She", "she"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    uncased = load_tokenizer(DataConfig(tokenizer=str(path)))
    cased = load_tokenizer(DataConfig(tokenizer=str(path), lowercase=False))
    assert _pieces(uncased, "She unhappy caf\u00e9!") == (
        ["she", "un", "##happ", "##y", "cafe", "!"],
        [True, True, False, False, True, True],
    )
    assert _pieces(cased, "She caf\u00e9")[0] == ["She", "caf\u00e9"]
    assert uncased.vocabulary == Vocabulary(size=13, pad=0, unk=1, cls=2, sep=3, mask=4)


def test_words_are_known_by_their_marks_where_the_tokenizer_does_not_cut_at_spaces(tmp_path):
    # As in SentencePiece models converted without a pre-tokenizer: a normalizer writes the marks.
    from tokenizers import normalizers

    pieces = ["<unk>", "<s>", "</s>", "\u2581she", "\u2581walk", "ed"]
    backend = Backend(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = Tokenizer(backend.to_str())
    assert _pieces(tokenizer, "she walked") == (["\u2581she", "\u2581walk", "ed"], [True, True, False])
    assert tokenizer.vocabulary == Vocabulary(size=6, unk=0, cls=1, sep=2, bos=1, eos=2)


def test_a_template_or_truncation_in_a_file_changes_no_corpus_token(trained, tmp_path):
    backend = Backend.from_str(trained["wordpiece"]._definition)
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert _pieces(loaded, TEXT) == _pieces(trained["wordpiece"], TEXT)


def test_mask_in_a_text_for_a_tokenizer_without_one_is_an_error():
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).to_str())
    with pytest.raises(DataError, match=r"the text has \[MASK\] and the tokenizer no mask token"):
        tokenizer.encode("a [MASK]")


def test_trained_tokenizer_is_cached_by_content(folder, cache, monkeypatch):
    config = DataConfig(name=str(folder), vocabulary_size=300)
    first = load_tokenizer(config)
    files = list((cache / "tokenizers").glob("*.json"))
    assert len(files) == 1
    monkeypatch.setattr("maskformer.data.tokenizer.train", lambda *_: pytest.fail("trained twice"))
    assert load_tokenizer(config).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("MASKFORMER_CACHE", str(cache))
    files[0].write_text(files[0].read_text()[:-40])  # as after a full disk
    assert load_tokenizer(config).fingerprint == first.fingerprint
    other = load_tokenizer(DataConfig(name=str(folder), vocabulary_size=120))
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "No such file or directory; give the path"),
        ("tokenizer.json", "{}", "no definition of the tokenizers library"),
        ("vocab.txt", "the\nof\n", "no line \\[UNK\\]"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_a_one_line_error(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        load_tokenizer(DataConfig(tokenizer=str(path)))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_vocabulary_too_small_for_the_characters_is_an_error(folder, cache):
    with pytest.raises(DataError, match="data.vocabulary_size=12: too small for the characters"):
        load_tokenizer(DataConfig(name=str(folder), vocabulary_size=12, tokenizer="unigram"))
