"""The TFDS builder of the embedded corpus: one record per chapter, stored as array_record, no TensorFlow."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from maskformer.data.austen import text as austen


class Austen(tfds.core.GeneratorBasedBuilder):
    """Six novels by Jane Austen, 269 chapters, split into train, validation and test by whole chapters."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Six novels from janeaustenr 1.0.0, one record per chapter."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Jane Austen's six novels (public domain), one record per chapter.",
            features=tfds.features.FeaturesDict(
                {"book": tfds.features.Text(), "chapter": tfds.features.Scalar(np.int32), "text": tfds.features.Text()}
            ),
            disable_shuffling=True,  # keeps reading order: neighbours in the file are neighbours in the book
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # the text is in the package
        return {split: self._generate_examples(split) for split in austen.SPLITS}

    def _generate_examples(self, split: str):
        index = 0
        for book in austen.BOOKS:
            for chapter in austen.chapters(book):
                if austen.split_of(chapter.key) == split:
                    yield index, {"book": chapter.book, "chapter": chapter.number, "text": chapter.text}
                    index += 1
