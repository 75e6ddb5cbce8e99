"""Downloading published text: OPUS-100, Flores-200, and the paper authors' own bitext."""

import csv
import os
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import disk_space_for
from fairseq_smoe.preparation.archives import problem_with
from fairseq_smoe.preparation.download import Download, download_all
from fairseq_smoe.preparation.recipe import fetch_recipe, read_recipe

OPUS100_URL = "https://object.pouta.csc.fi/OPUS-100/v1.0/"
FLORES200_URL = "https://dl.fbaipublicfiles.com/nllb/flores200_dataset.tar.gz"
M15_SOURCE = "gdrive:1tT2urUunXLNEPZxxV2nK-YmC_N6P_48m"


@dataclass(frozen=True)
class Opus100Archive:
    """A line of ``benchmarks/opus100.tsv``; sizes of splits in sentence pairs."""

    lang: str
    pair: str  # in alphabetical order, as OPUS names it: af-en
    train: int
    dev: int
    test: int
    archive: str
    archive_bytes: int
    sha256: str
    resource: str


def fetch(plan):
    """Download everything that a plan with a benchmark needs; returns the folders and archives."""
    folder = plan.downloads
    if plan.benchmark == "opus100":
        address = plan.data_address or OPUS100_URL
        return fetch_opus100(folder, plan.pairs, address, plan.connections)
    if plan.recipe:
        pairs = read_recipe(plan.recipe) if plan.skip_missing else plan.pairs
        pairs = [pair for pair in plan.pairs if pair in pairs]
        text = fetch_recipe(folder, plan.recipe, pairs, plan.connections)
    else:
        text = fetch_m15(folder, plan.data_address or M15_SOURCE)
    return [text, fetch_flores200(folder, plan.flores_address)]


def opus100_archives():
    """Every :class:`Opus100Archive`."""
    table = resources.files("fairseq_smoe") / "benchmarks" / "opus100.tsv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    columns = fields(Opus100Archive)
    return [Opus100Archive(**{c.name: c.type(row[c.name]) for c in columns}) for row in rows]


def fetch_opus100(folder, pairs, base_url=OPUS100_URL, connections=4):
    """Download the archives of ``pairs``, named in either order; returns their paths.

    Raises:
        OptionError: a pair is not in OPUS-100, or an archive cannot be downloaded.
    """
    archives = {entry.lang: entry for entry in opus100_archives()}
    downloads = []
    for pair in pairs:
        lang = next((lang for lang in pair.split("-") if lang != "en"), None)
        if lang not in archives or sorted((lang, "en")) != sorted(pair.split("-")):
            raise OptionError(
                f"--pairs {pair}: not in OPUS-100, which has en with {', '.join(sorted(archives))}"
            )
        entry = archives[lang]
        url = f"{base_url.rstrip('/')}/{entry.archive}"
        path = folder / entry.archive
        downloads.append(Download(url, path, entry.archive_bytes, entry.sha256))
    download_all(downloads, connections)
    return [download.path for download in downloads]


def fetch_flores200(folder, url=FLORES200_URL):
    """Download Flores-200, of which no checksum is published; returns the path of the archive."""
    path = folder / "flores200_dataset.tar.gz"
    remedy = "give another address with --flores-url, or files you have with --from"
    download_all([Download(url, path, check=problem_with, remedy=remedy)])
    return path


def fetch_m15(folder, source=M15_SOURCE):
    """Download the authors' training text; returns the path of the archive.

    Args:
        source: an http(s) address, or ``gdrive:ID`` of a file on Google Drive.
    """
    kind, _, place = source.partition(":")
    if kind == "gdrive":
        path = folder / "m15.zip"
        if not path.exists():
            _from_google_drive(place, path)
    else:
        name = PurePosixPath(urlsplit(source).path).name.strip(".")
        path = folder / (name or "m15.zip")
        download_all([Download(source, path, check=problem_with)])
    return path


def _from_google_drive(file_id, path):
    try:
        import gdown
    except ImportError as error:
        raise OptionError(
            f"--base-url gdrive:{file_id}: needs the package gdown; "
            "pip install 'fairseq-smoe[data]'"
        ) from error
    remedy = (
        "Google Drive limits how often a file is fetched a day: try again tomorrow, or fetch "
        f"https://drive.google.com/file/d/{file_id} in a browser and save it as {path}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    untested = path.with_name(f"untested-{path.name}")
    try:
        with disk_space_for(path):
            # gdown keeps an incomplete download beside the file, and resumes it
            gdown.download(id=file_id, output=str(untested), resume=True, retries=5, timeout=60)
    except OptionError:
        raise
    except Exception as error:  # gdown may raise anything for an unexpected answer
        reason = " ".join(str(error).split())
        raise OptionError(f"--base-url gdrive:{file_id}: {reason}; {remedy}") from error
    if problem := problem_with(untested):
        untested.unlink()
        raise OptionError(f"--base-url gdrive:{file_id}: {problem}; {remedy}")
    os.replace(untested, path)
