"""Downloads the public data sets that benchmarks and slow tests read.

    python -m scripts.data [DIR]

into DIR, else `$ARROWMOE_DATA`, else `../shared/data`. A file that is there with the right digest is left alone; one
that arrives with another digest is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Final

from registry.digest import Digest, digest_of
from registry.errors import ArrowMoEError

ROOT: Final = Path(__file__).parents[1]
TIMEOUT_S: Final = 30.0
GITHUB: Final = "https://raw.githubusercontent.com"
CLINC: Final = f"{GITHUB}/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data"
BANKING: Final = f"{GITHUB}/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data"


class DownloadError(ArrowMoEError):
    """A file cannot be had, or is not the one that was expected."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file `name`, where it comes from, how long it is, and its digest."""

    name: str
    url: str
    nbytes: int
    digest: Digest


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Files under one licence."""

    name: str
    licence: str
    sources: tuple[Source, ...]


DATA_SETS: Final = (
    DataSet(
        name="CLINC150",
        licence="CC BY 3.0, Larson et al. 2019, github.com/clinc/oos-eval",
        sources=(
            Source(
                name="clinc150_data_full.json",
                url=f"{CLINC}/data_full.json",
                nbytes=2_495_390,
                digest=Digest("blake3:6ea79b683959dd8fa5276540e853b24dfc44480e45a1673ac0dce75e581c452b"),
            ),
            Source(
                name="clinc150_domains.json",
                url=f"{CLINC}/domains.json",
                nbytes=3_818,
                digest=Digest("blake3:327c56f64268b9f2a7a536c08753bc214fd1c4d079e7209d9101c3fe3854abac"),
            ),
        ),
    ),
    DataSet(
        name="BANKING77",
        licence="CC BY 4.0, Casanueva et al. 2020, github.com/PolyAI-LDN/task-specific-datasets",
        sources=(
            Source(
                name="banking77_train.csv",
                url=f"{BANKING}/train.csv",
                nbytes=839_073,
                digest=Digest("blake3:9e3a20a3bfdcb742baa6cbc9fc8f900a6465714220c5b1fe11d3f666942516f3"),
            ),
            Source(
                name="banking77_test.csv",
                url=f"{BANKING}/test.csv",
                nbytes=239_961,
                digest=Digest("blake3:8df32ef8bc5ebcdb8b6049b7ff33ab5fc956bf3f2eb8c113ed491f8011ec7712"),
            ),
            Source(
                name="banking77_categories.json",
                url=f"{BANKING}/categories.json",
                nbytes=2_036,
                digest=Digest("blake3:516087158aecada6c263152e7859850f695d4d0fe6201501f52782c10c08c490"),
            ),
        ),
    ),
)


def data_dir() -> Path:
    """Where the data is: `$ARROWMOE_DATA`, else `../shared/data` beside the checkout."""
    return Path(os.environ.get("ARROWMOE_DATA") or ROOT.parent / "shared" / "data")


def download(source: Source, directory: Path) -> bool:
    """Have `source` in `directory`, whole and verified; False if it was there. Raises `DownloadError`."""
    path = directory / source.name
    if path.exists() and digest_of(path.read_bytes()) == source.digest:
        return False
    data = _fetched(source)
    if digest_of(data) != source.digest:
        got = f"{len(data)} bytes of {digest_of(data)}"
        raise DownloadError(f"{source.url}: expected {source.nbytes} bytes of {source.digest}, got {got}; not kept")
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f"{path.suffix}.part")
    part.write_bytes(data)
    part.replace(path)
    return True


def main(arguments: Sequence[str] | None = None, *, data_sets: Sequence[DataSet] = DATA_SETS) -> int:
    """Download what is missing, say what came and under which licence; 1 if something could not be had."""
    parser = argparse.ArgumentParser(prog="python -m scripts.data", description="Download the public data sets.")
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="default: $ARROWMOE_DATA")
    directory = parser.parse_args(arguments).directory or data_dir()
    try:
        for data_set in data_sets:
            print(f"{data_set.name}: {data_set.licence}")
            for source in data_set.sources:
                came = download(source, directory)
                print(f"  {directory / source.name}: {'downloaded' if came else 'already there'}")
    except DownloadError as error:
        print(f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1
    return 0


def _fetched(source: Source) -> bytes:
    """The bytes at the source's address: never many more than expected."""
    try:
        with urllib.request.urlopen(source.url, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(source.nbytes + 1)
    except (OSError, HTTPException) as error:
        hint = f"check the network, or put the file into place by hand as {source.name}"
        raise DownloadError(f"{source.url}: expected the file, got {error}", hint=hint) from error
    return data


if __name__ == "__main__":
    sys.exit(main())
