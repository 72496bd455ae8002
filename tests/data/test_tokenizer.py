"""Tokenizers are reproducible, reversible, mark words, and tell special tokens from text that spells them."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from maskformer.data import DataConfig, DataError, load_tokenizer
from maskformer.data import tokenizer as tokenizer_module
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
from maskformer.data import tokenizer as tokenizer_module
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


@pytest.mark.parametrize("name", ["tokenizer.JSON", "tokenizer.json.gz", "tokenizer.Json.GZ", "vocab.TXT.gz"])
def test_what_a_tokenizer_file_holds_is_told_by_its_suffix_in_any_case_and_through_gzip(trained, name, tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[MASK]\nshe\n##s\n")
    trained["wordpiece"].save(tmp_path / "tokenizer.json")
    plain = tmp_path / ("vocab.txt" if name.startswith("vocab") else "tokenizer.json")
    opened = gzip.open if name.lower().endswith(".gz") else open
    with opened(tmp_path / name, "wb") as file:
        file.write(plain.read_bytes())
    read, expected = (load_tokenizer(DataConfig(tokenizer=str(path))) for path in (tmp_path / name, plain))
    assert read.fingerprint == expected.fingerprint and read.vocabulary == expected.vocabulary


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


def _unigram(pieces, normalizer=None, added=(), unk=0):
    """As XLM-R's and T5's files are: the special tokens are pieces of the model, too."""
    backend = Backend(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=unk))
    backend.normalizer = normalizer
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    return Tokenizer(backend.to_str())


_XLM_R = ["<unk>", "<s>", "<pad>", "</s>", "<mask>", "\u2581", "\u2581cat", *"<>/smakpd"]
_FULLWIDTH = str.maketrans({chr(c): chr(c + 0xFEE0) for c in range(ord("!"), ord("~") + 1)})


@pytest.mark.parametrize("name", ["<s>", "</s>", "<pad>", "<mask>"])
def test_a_special_token_that_a_normalizer_makes_of_a_corpus_is_text(name):
    tokenizer = _unigram(_XLM_R, normalizers.NFKC(), ["<s>", "<pad>", "</s>", "<mask>"])
    reserved = set(tokenizer.vocabulary.special_ids) - {tokenizer.vocabulary.unk}
    assert tokenizer.token_id(name) in reserved
    for spelled in (name, name.translate(_FULLWIDTH), f"cat{name}cat".translate(_FULLWIDTH)):
        tokens, starts = tokenizer.encode_texts([f"{spelled} cat"])[0]
        assert not reserved & set(tokens.tolist())
        assert tokens[-1] == tokenizer.token_id("\u2581cat") and starts[-1]
    # Written as text, letter by letter.
    assert tokenizer.decode(tokenizer.encode_texts([name.translate(_FULLWIDTH)])[0][0]) == name


@pytest.mark.parametrize("kind", KINDS)
def test_no_trained_tokenizer_makes_a_special_token_of_fullwidth_letters(trained, kind):
    names = ["[MASK]", "[CLS]", "[SEP]", "[PAD]"]
    for (tokens, _), name in zip(trained[kind].encode_texts([n.translate(_FULLWIDTH) for n in names]), names):
        assert not {0, 2, 3, 4} & set(tokens.tolist()), name


def test_sentinels_in_a_corpus_are_text_whatever_the_normalizer(documents):
    tokenizer = Tokenizer(train("unigram", lambda: iter(documents), 300, lowercase=False, sentinels=2))
    for text in ("<extra_id_0>", "<extra_id_0>".translate(_FULLWIDTH), "a<extra_id_1>b"):
        assert not set(tokenizer.vocabulary.sentinels) & set(tokenizer.encode_texts([text])[0][0].tolist())


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"[UNK]": 0, "[MASK]": 1, "cat": 2}, unk_token="[UNK]"),
        models.WordPiece({"[UNK]": 0, "[MASK]": 1, "cat": 2}, unk_token="[UNK]"),
        models.BPE(
            {"[UNK]": 0, "[M]": 1, "cat": 2, "[": 3, "M": 4, "]": 5, "[M": 6, "c": 7, "a": 8, "t": 9, "ca": 10},
            [("[", "M"), ("[M", "]"), ("c", "a"), ("ca", "t")],
            unk_token="[UNK]",
        ),
    ],
    ids=["WordLevel", "WordPiece", "BPE"],
)
@pytest.mark.parametrize("special", [True, False])
def test_no_model_gives_a_special_token_for_a_word_that_spells_it(model, special):
    backend = Backend(model)
    name = backend.id_to_token(1)
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.WhitespaceSplit()
    (backend.add_special_tokens if special else backend.add_tokens)([AddedToken(name, special=special)])
    tokenizer = Tokenizer(backend.to_str())
    if not (special or name == "[MASK]"):
        return  # an added token that nothing marks as special is text
    for text in (f"cat {name} cat", f"cat {name.translate(_FULLWIDTH)} cat"):
        tokens, _ = tokenizer.encode_texts([text])[0]
        assert 1 not in tokens and tokens[0] == tokens[-1] == 2
    assert 1 in tokenizer.encode(f"cat {name} cat")[0]


def test_a_model_whose_unknown_token_is_reserved_is_an_error_where_it_writes_it():
    tokenizer = _unigram(["<pad>", "<mask>", "\u2581cat"])
    assert tokenizer.encode_texts(["cat"])[0][0].tolist() == [2]
    with pytest.raises(DataError, match=r"writes <pad> for text that it does not know; give it an \[UNK\] token"):
        tokenizer.encode_texts(["dog"])


_RUSSIAN = "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u043a\u0430\u043a \u0434\u0435\u043b\u0430"


@pytest.mark.parametrize("cut", [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
@pytest.mark.parametrize("model", ["bpe", "unigram", "wordlevel"])
def test_words_of_a_vocabulary_without_latin_letters_start_where_the_text_has_them(cut, model):
    made, trainer = {
        "bpe": (models.BPE(), trainers.BpeTrainer(vocab_size=80, show_progress=False)),
        "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=80, show_progress=False)),
        "wordlevel": (models.WordLevel(), trainers.WordLevelTrainer(vocab_size=80, show_progress=False)),
    }[model]
    backend = Backend(made)
    backend.pre_tokenizer = cut
    if isinstance(cut, pre_tokenizers.ByteLevel):
        backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator([_RUSSIAN] * 50, trainer)
    ((_, starts),) = Tokenizer(backend.to_str()).encode_texts([_RUSSIAN])
    assert starts.sum() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_of_200_kilobytes_is_learned_from_in_pieces_and_encoded_as_one(kind, monkeypatch):
    # Trainers take time with the square of a word: over 25 s for this one.
    word, learned = "ab" * 100_000, []
    real = getattr(tokenizer_module, f"_train_{kind}")

    def spy(documents, size, lowercase):
        learned.extend(documents())
        return real(documents, size, lowercase)

    monkeypatch.setattr(tokenizer_module, f"_train_{kind}", spy)
    tokenizer = Tokenizer(train(kind, lambda: iter(["she walked " * 200, word]), 280, lowercase=False))
    assert learned[0] == "she walked " * 200
    assert learned[1].replace(" ", "") == word and max(map(len, learned[1].split())) == 4096
    ((_, starts),) = tokenizer.encode_texts([word])
    assert starts.sum() == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"[]", r"no definition of the tokenizers library \(found list, expected an object\)"),
        ("tokenizer.json", b"[" * 100_000, "JSON nested too deeply"),
        ("tokenizer.json", b'{"version": ' + b"9" * 5000 + b"}", "a number too long to read"),
        ("tokenizer.json", b'{"a": "\xe9"}', "tokenizer.json:1: not UTF-8"),
        ("tokenizer.json", b"{", "not JSON"),
        ("vocab.txt", "[UNK]\ncaf\u00e9\n".encode("latin-1"), "vocab.txt:2: not UTF-8 .*iconv -f LATIN1"),
        ("vocab.txt", b"", "no line \\[UNK\\]"),
    ],
)
def test_a_damaged_tokenizer_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_tokenizer(DataConfig(tokenizer=str(tmp_path / name)))
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(trained, tmp_path):
    trained["wordpiece"].save(tmp_path / "tokenizer.json")
    pieces = "[UNK]\n[MASK]\nshe\n##s\n"
    (tmp_path / "vocab.txt").write_text(pieces)
    plain = [load_tokenizer(DataConfig(tokenizer=str(tmp_path / n))) for n in ("tokenizer.json", "vocab.txt")]
    for name in ("tokenizer.json", "vocab.txt"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    marked = [load_tokenizer(DataConfig(tokenizer=str(tmp_path / n))) for n in ("tokenizer.json", "vocab.txt")]
    assert [t.fingerprint for t in marked] == [t.fingerprint for t in plain]


def _word_level(vocabulary, added=()):
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return json.dumps({"version": "1.0", "added_tokens": list(added), "model": model})


@pytest.mark.parametrize("token", [2**24, 2**31, 2**32 - 1, 2**70])
def test_an_id_that_no_table_can_hold_is_an_error(tmp_path, token):
    path = tmp_path / "tokenizer.json"
    added = {"id": token, "content": "[MASK]", "special": True}
    for content in (_word_level({"[UNK]": 0, "she": token}), _word_level({"[UNK]": 0}, [added])):
        path.write_text(content)
        with pytest.raises(DataError, match=f"has the id {token}, expected at most 16777215; number the tokens from 0"):
            load_tokenizer(DataConfig(tokenizer=str(path)))


def test_special_tokens_that_contradict_each_other_name_the_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(_word_level({"[PAD]": 0, "[MASK]": 0, "[UNK]": 1}))
    with pytest.raises(DataError, match="data.tokenizer='.*tokenizer.json': vocabulary.mask=0 is also vocabulary.pad"):
        load_tokenizer(DataConfig(tokenizer=str(path)))


@pytest.mark.parametrize("damage", ["a letter", "a list", "a number", "binary", "empty"])
def test_a_cached_tokenizer_that_is_not_what_was_trained_is_trained_again(folder, cache, damage):
    config = DataConfig(name=str(folder), vocabulary_size=120)
    first = load_tokenizer(config)
    (file,) = (cache / "tokenizers").glob("*.json")
    content = file.read_bytes()
    changed = {
        "a letter": content.replace(b'the\\"', b'thf\\"', 1),
        "a list": b"[1, 2]",
        "a number": b"17",
        "binary": b"\x80\xff\x00",
        "empty": b"",
    }[damage]
    assert changed != content
    file.write_bytes(changed)
    assert load_tokenizer(config).fingerprint == first.fingerprint and file.read_bytes() == content
