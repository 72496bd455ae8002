"""Folders as they are found: marks, links, hidden files, compression and encodings are read, or refused by name."""

import codecs
import gzip
import json
import logging
import os

import pytest

from maskformer.data import DataConfig, DataError
from maskformer.data.sources import open_source

TEXT = "Der Käse\nist gut.\n"


def read(folder, split="train", **fields):
    return list(open_source(DataConfig(name=str(folder), **fields), split).documents())


def line(text):
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["train.txt", "train.TXT", "train.txt.gz", "train.jsonl", "train.JSONL.GZ"])
def test_text_is_the_same_whatever_the_encoding_compression_and_case_of_the_suffix(tmp_path, name, encoding):
    content = (line(TEXT) + line("b") if "json" in name.lower() else TEXT).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert read(tmp_path) == ([TEXT, "b"] if "json" in name.lower() else [TEXT])


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf_16_of_either_byte_order_is_read(tmp_path, mark):
    encoding = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"
    (tmp_path / "train.txt").write_bytes(mark + TEXT.encode(encoding))
    assert read(tmp_path) == [TEXT]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", b"one\ntwo\ncaf\xe9\n", r"train.txt:3: not UTF-8 \(byte 0xe9 at byte 4 of the line\); .*LATIN1"),
        ("train.jsonl", b'{"text": "caf\xe9"}\n', r"train.jsonl:1: not UTF-8 .*iconv -f LATIN1 -t UTF-8"),
        ("train.txt", "no mark".encode("utf-16-le"), "train.txt: not text, or UTF-16 without a byte order mark; conv"),
        ("train.txt", codecs.BOM_UTF16_LE + b"odd", "train.txt: damaged UTF-16.* text .*; write it again as UTF-8"),
        ("train.txt.gz", b"not compressed", "train.txt.gz: damaged gzip file"),
        ("train.txt.gz", gzip.compress(b"x" * 9999)[:-20], "train.txt.gz: damaged gzip file"),
        ("train.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "train.jsonl:1: a number too long to read .*; write one"),
        ("train.jsonl", b"\n" + b"[" * 100_000, "train.jsonl:2: JSON nested too deeply to read; write one JSON"),
        ("train.jsonl", b'[\n  {"text": "a"}\n]', r"train.jsonl:1: not JSON .* not one array over several: jq -c"),
        ("train.jsonl", b'[{"text": "a"}]', "train.jsonl:1: no key 'text', found list; write one JSON object a line"),
        ("train.jsonl", b"{}", "train.jsonl:1: no key 'text', found none; set data.text_key"),
        ("train.jsonl", b"", "train.jsonl: holds no document for the 'train' split; put text into it"),
        ("train.txt", b"", "train.txt: holds no document for the 'train' split; put text into it"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_line_and_fix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path / name) in str(raised.value)


def test_thousands_of_keys_do_not_make_an_error_of_thousands_of_words(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({f"key{i}": "" for i in range(5000)}))
    with pytest.raises(DataError, match="no key 'text', found key0, key1, .* key4999; set") as raised:
        read(tmp_path)
    assert len(str(raised.value)) < len(str(tmp_path)) + 300


def test_links_are_followed_circles_end_and_hidden_files_are_passed_over_and_said_once(tmp_path, caplog):
    elsewhere, corpus = tmp_path / "elsewhere", tmp_path / "corpus"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "a.txt").write_text("a")
    (corpus / "train").mkdir(parents=True)
    (corpus / "train" / "b.txt").write_text("b")
    (corpus / "train" / "more").symlink_to(elsewhere)
    (corpus / "train" / "c.txt").symlink_to(elsewhere / "deep" / "a.txt")
    (corpus / "train" / "again").symlink_to(corpus / "train")
    (corpus / "train" / "up").symlink_to(corpus)
    (elsewhere / "self").symlink_to(elsewhere / "self")
    (corpus / "validation").symlink_to(elsewhere)
    (corpus / "train" / "gone.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(corpus / "train" / "pipe.txt")
    (corpus / "train" / "notes.md").write_text("not data")
    for hidden in ("._b.txt", ".ipynb_checkpoints/b.txt", ".DS_Store"):
        (corpus / "train" / hidden).parent.mkdir(exist_ok=True)
        (corpus / "train" / hidden).write_bytes(b"\xff\xfe\0")
    with caplog.at_level(logging.WARNING):
        assert sorted(read(corpus)) == ["a", "a", "b"]
        assert read(corpus, "validation") == ["a"], "a folder that two splits link to belongs to both"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"data.name='{corpus}': read 4 files, followed 3 links; passed over 3 hidden, 2 linked to a folder read"
        " already, 3 linked to nothing, 1 neither file nor folder, 1 with other suffixes"
    )


def test_a_plain_folder_is_read_without_a_word(tmp_path, caplog):
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "README.md").write_text("not data")
    with caplog.at_level(logging.WARNING):
        read(tmp_path)
    assert not caplog.records


def test_what_is_replaced_is_counted_and_said_once(tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n{"text": "\\udc00"}\n')
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == read(tmp_path) == ["a?b", "c", "?"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'train.jsonl'}: 2 documents spell half a surrogate pair; it is read as '?'"
    ]


def test_a_name_that_is_no_text_is_read_and_printed(tmp_path):
    name = os.fsdecode(b"train-caf\xe9\n.jsonl")
    (tmp_path / name).write_text(line("a"))
    source = open_source(DataConfig(name=str(tmp_path)), "train")
    assert list(source.documents()) == ["a"] and len(source.fingerprint) == 24
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError) as raised:
        read(tmp_path)
    assert r"train-caf\xe9\n.jsonl:1: not JSON" in str(raised.value) and "\n" not in str(raised.value)
    str(raised.value).encode()


def test_bytes_are_those_in_the_files_and_newlines_those_of_text(tmp_path):
    written = "a line\r\n" * 200
    (tmp_path / "train.txt").write_bytes(codecs.BOM_UTF8 + written.encode())
    (tmp_path / "train-1.txt").write_bytes(b"mac\rend")
    (tmp_path / "train-2.jsonl").write_bytes(b'{"text": "kept\\r\\n"}\r\n')
    source = open_source(DataConfig(name=str(tmp_path)), "train")
    assert list(source.documents()) == ["mac\nend", "kept\r\n", written.replace("\r\n", "\n")]
    assert source.text_bytes() == len(written) + len("mac\rend") + len("kept\r\n")


def test_newlines_do_not_change_the_split_of_a_document(tmp_path):
    for kind, newline in (("unix", "\n"), ("windows", "\r\n")):
        (tmp_path / kind).mkdir()
        for i in range(40):
            (tmp_path / kind / f"{i}.txt").write_bytes(f"document{newline}{i}".encode())
    for split in ("train", "validation", "test"):
        sources = [open_source(DataConfig(name=str(tmp_path / kind)), split) for kind in ("unix", "windows")]
        documents = [list(source.documents()) for source in sources]
        assert documents[0] == documents[1]
        unix, windows = (source.text_bytes() for source in sources)
        assert windows == unix + len(documents[0])
