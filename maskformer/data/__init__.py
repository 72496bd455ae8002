"""Text to packed, indexed token examples: a corpus, a tokenizer, rows of a fixed length, two iterators.

config = DataConfig(name="austen", length=128)
tokenizer = load_tokenizer(config)
dataset = load_dataset(config, "train", tokenizer)
for batch in dataset.train_batches(global_batch_size=32, seed=0): ...
"""

from maskformer.data.cache import cache_dir
from maskformer.data.config import DataConfig, DataError
from maskformer.data.dataset import PackedDataset, TrainBatches, load_dataset
from maskformer.data.rows import batch_layout
from maskformer.data.tokenizer import DEFAULT_VOCABULARY_SIZE, Tokenizer, load_tokenizer

__all__ = [
    "DEFAULT_VOCABULARY_SIZE",
    "DataConfig",
    "DataError",
    "PackedDataset",
    "Tokenizer",
    "TrainBatches",
    "batch_layout",
    "cache_dir",
    "load_dataset",
    "load_tokenizer",
]
