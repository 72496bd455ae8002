"""A folder of made-up English-like text, small enough to train on in a moment."""

import random

import pytest

WORDS = (
    "the of and her she was that had with for not but him his they been very could would must said much all any "
    "such one miss lady every nothing think know little good time house being might never should only more walking "
    "walked walks unhappy happiness happily evening evenings morning friendship acquaintance"
).split()


def made_up_text(seed: int, sentences: int) -> str:
    """Sentences of random words, five to a paragraph."""
    source = random.Random(seed)
    made = [
        " ".join(source.choices(WORDS, k=source.randint(1, 24))).capitalize() + source.choice(".!?")
        for _ in range(sentences)
    ]
    return "\n\n".join(" ".join(made[i : i + 5]) for i in range(0, len(made), 5))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MASKFORMER_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A corpus of .txt files with a folder for each split."""
    root = tmp_path_factory.mktemp("corpus")
    for split, documents in {"train": 12, "validation": 3, "test": 2}.items():
        (root / split).mkdir()
        for i in range(documents):
            (root / split / f"{i}.txt").write_text(made_up_text(100 * documents + i, sentences=3 + 7 * i))
    return root
