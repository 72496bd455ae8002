"""Prepares data ahead of a run, as on a login node with a network.

    python -m maskformer.data.prepare --name=tfds:lm1b --data_dir=/data/tfds
    python -m maskformer.data.prepare --name=austen --length=256 --rows

A TFDS dataset is downloaded, where it is not yet there, and written as array_record. With --rows the tokenizer is
trained and the rows of all splits are packed into the cache, too, and their sizes printed. The flags are the fields
of `DataConfig`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from maskformer.checks import first_line
from maskformer.data.cache import out_of_space
from maskformer.data.data_config import SPLITS, DataConfig, DataError
from maskformer.data.dataset import load_dataset
from maskformer.data.sources import tfds_builder
from maskformer.data.tokenizer import load_tokenizer


def prepare_tfds(config: DataConfig) -> None:
    """Downloads and prepares the TFDS dataset that `config` names as array_record, if it is not prepared yet.

    Raises:
      DataError: TFDS has no such dataset, or it cannot be prepared.
    """
    builder = tfds_builder(config, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        # Some of TFDS's own preparation code needs TensorFlow; reading what it prepared does not.
        raise DataError(f"data.name={config.name!r}: preparing needs {error.name}; pip install {error.name}") from None
    except Exception as error:  # network, disk and every dataset's own code
        reason = out_of_space(error) or first_line(error)
        where = f" in {config.data_dir or 'its own folder'}: {reason}" if out_of_space(error) else f": {reason}"
        raise DataError(f"data.name={config.name!r}: TFDS cannot prepare it{where}") from error


def _parse(arguments: list[str]) -> tuple[DataConfig, bool]:
    parser = argparse.ArgumentParser(
        prog="python -m maskformer.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", action="store_true", default=False, help="train the tokenizer and pack the rows")
    for field in fields(DataConfig):
        parser.add_argument(f"--{field.name}", type=_reader(str(field.type)), help=f"default: {field.default}")
    values = vars(parser.parse_args(arguments))
    rows = values.pop("rows")
    return DataConfig(**values), rows


def _reader(annotation: str):
    def read(text: str):
        if text == "None" and "None" in annotation:
            return None
        if "bool" in annotation:
            if text.lower() not in ("true", "false"):
                raise ValueError(text)
            return text.lower() == "true"
        return int(text) if "int" in annotation else text

    read.__name__ = annotation  # argparse names it in "invalid ... value"
    return read


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0, or 2 after a one-line error."""
    try:
        config, rows = _parse(sys.argv[1:] if arguments is None else arguments)
        if config.is_tfds:
            prepare_tfds(config)
        if rows:
            tokenizer = load_tokenizer(config)
            print(f"{'split':<12}{'rows':>12}{'tokens':>16}{'fill':>8}")
            for split in SPLITS:
                dataset = load_dataset(config, split, tokenizer)
                print(f"{split:<12}{len(dataset):>12,}{dataset.tokens_per_epoch:>16,}{dataset.fill:>8.3f}")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
