"""Jane Austen's six novels: the embedded corpus, as plain text and as a TFDS builder."""

from maskformer.data.austen.builder import Austen
from maskformer.data.austen.text import BOOKS, Chapter, chapters, split_of

__all__ = ["BOOKS", "Austen", "Chapter", "chapters", "split_of"]
