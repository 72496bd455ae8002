"""Rebuilds the compressed novels, byte for byte, from Debian's package of the R data set janeaustenr.

    apt-get download r-cran-janeaustenr                 # version 1.0.0-1
    pip install rdata
    python -m maskformer.data.austen.rebuild r-cran-janeaustenr_1.0.0-1_all.deb [--out FOLDER]

Prints one checksum line per file and exits 1 if one differs from PROVENANCE.md. Without --out nothing is
written: the files are only compared.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import io
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

from maskformer.data.austen.text import BOOKS, FOLDER

DEB_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
_DATA = "./usr/lib/R/site-library/janeaustenr/data/Rdata"


def novels(deb: Path) -> dict[str, bytes]:
    """The lines of each novel as UTF-8 text, each line ended by a newline, from the Debian package `deb`."""
    import rdata  # only this script needs it

    content = deb.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != DEB_SHA256:
        raise SystemExit(f"{deb}: sha256 {found}, expected {DEB_SHA256} (version 1.0.0-1)")
    with tarfile.open(fileobj=io.BytesIO(_ar_member(content, "data.tar"))) as archive:
        table, blob = (archive.extractfile(_DATA + suffix).read() for suffix in (".rdx", ".rdb"))  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lazy-load table has no R magic number of its own
        variables = rdata.read_rds(io.BytesIO(table))["variables"]
        texts = {}
        for book in BOOKS:
            offset, length = variables[book]
            # Each entry is a 4-byte big-endian length, then a zlib stream.
            serialized = zlib.decompress(blob[offset + 4 : offset + length])
            lines = rdata.conversion.convert(rdata.parser.parse_data(serialized))
            texts[book] = "".join(f"{line}\n" for line in lines).encode("utf-8")
    return texts


def _ar_member(content: bytes, prefix: str) -> bytes:
    """One member of a Debian package, which is an `ar` archive: 60-byte headers, members padded to even size."""
    position = len(b"!<arch>\n")
    while position < len(content):
        header = content[position : position + 60]
        size = int(header[48:58])
        if header[:16].decode().startswith(prefix):
            return content[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise SystemExit(f"no member {prefix}* in the package")


def main() -> int:
    """Runs the command in the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deb", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="write the files there")
    arguments = parser.parse_args()
    recorded = (FOLDER / "PROVENANCE.md").read_text()
    differs = 0
    for book, text in novels(arguments.deb).items():
        packed = bz2.compress(text, compresslevel=9)
        checksum = hashlib.sha256(packed).hexdigest()
        same = f"{checksum}  {book}.txt.bz2" in recorded
        differs += not same
        print(f"{checksum}  {book}.txt.bz2  {'as recorded' if same else 'DIFFERS from PROVENANCE.md'}")
        if arguments.out is not None:
            (arguments.out / f"{book}.txt.bz2").write_bytes(packed)
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
