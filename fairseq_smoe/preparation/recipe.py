"""Training text from published corpora, listed in a recipe, through the package mtdata.

mtdata knows the addresses and formats. It runs in child processes, because importing it sets up
logging and loads a large index.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import whole_file, write_whole
from fairseq_smoe.preparation.archives import problem_with
from fairseq_smoe.preparation.download import Download, download_all

# {data set: [[address, file of mtdata's cache, file that marks it complete, is an archive], ...]}
_LOCATE = """
import json, sys
from urllib.parse import urlsplit
from mtdata import cache_dir
from mtdata.cache import Cache
from mtdata.entry import DatasetId
from mtdata.index import INDEX

cache, places = Cache(cache_dir), {}
for name in sys.argv[1:]:
    try:
        entry = INDEX[DatasetId.parse(name)]
    except Exception:
        continue
    if entry.in_ext == "opus_xces":
        urls = [(url, None) for url in (entry.url, *entry.in_paths)]
    elif isinstance(entry.url, str):
        urls = [(entry.url, entry.filename)]
    else:
        urls = [(url, None) for url in entry.url]
    places[name] = []
    for url, filename in urls:
        if urlsplit(url).hostname != "huggingface.co":  # these have a package of their own
            path = cache.get_local_path(url, filename=filename, fix_missing=False, entry=entry)
            places[name].append([url, str(path), str(cache.get_flag_file(path)), entry.is_archive])
print(json.dumps(places))
"""


def read_recipe(path):
    """``{pair: {data set: line number}}`` of lines ``PAIR DATASET_ID``; ``#`` begins a comment.

    Raises:
        OptionError: names the line that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise OptionError(f"--recipe {path}: no such file")
    recipe = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        langs = _languages(words[-1])
        if len(words) != 2 or len(langs) != 2:
            raise OptionError(
                f"--recipe {path}, line {number}: expected PAIR DATASET_ID, such as "
                "eng-nso OPUS-gnome-v1-eng-nso"
            )
        pair, name = words
        if sorted(langs) != sorted(pair.split("-")):
            raise OptionError(
                f"--recipe {path}, line {number}: {name} is not of the languages {pair}; name the "
                "pair with the codes of the data set"
            )
        if name in recipe.setdefault(pair, {}):
            raise OptionError(f"--recipe {path}, line {number}: {name} is there a second time")
        recipe[pair][name] = number
    return recipe


def fetch_recipe(folder, recipe, pairs, connections=4):
    """Concatenate the data sets of every pair to ``train.PAIR.LANG``; returns their folder.

    Downloads go to the environment variable MTDATA, else to ``folder/mtdata``. Pairs of sentences
    with an empty side are left out.

    Raises:
        OptionError: names the line of the recipe that is wrong, or whose data is not available.
    """
    listed = read_recipe(recipe)
    for pair in pairs:
        if pair not in listed:
            raise OptionError(
                f"--recipe {recipe}: nothing for {pair}; add lines '{pair} DATASET_ID'"
            )
    target = folder / "recipe"
    unfinished = [pair for pair in pairs if not _is_finished(target, pair, listed[pair])]
    if not unfinished:
        return target
    if importlib.util.find_spec("mtdata") is None:
        raise OptionError(
            f"--recipe {recipe}: needs the package mtdata; pip install 'fairseq-smoe[data]'"
        )
    cache = Path(os.environ.get("MTDATA", folder / "mtdata")).expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    lines = {name: number for pair in unfinished for name, number in listed[pair].items()}
    _download(lines, recipe, cache, connections)
    for pair in unfinished:
        _write_pair(target, pair, listed[pair], recipe, cache)
    return target


def _languages(name):
    """``OPUS-gnome-v1-cat-eng_GB`` -> ``["cat", "eng"]``"""
    return [lang.partition("_")[0] for lang in name.split("-")[3:]]


def _is_finished(target, pair, names):
    record = target / f"train.{pair}.datasets"
    texts = [target / f"train.{pair}.{lang}" for lang in pair.split("-")]
    if not all(path.exists() for path in (record, *texts)):
        return False
    return record.read_text(encoding="utf-8").split() == list(names)


def _download(lines, recipe, cache, connections):
    """Download into mtdata's cache. mtdata itself would start from zero after an interruption."""
    with _mtdata(["-c", _LOCATE, *lines], cache, f"--recipe {recipe}") as output:
        places = output.read()
    places = json.loads(places)
    downloads, marks = {}, []
    for name, number in lines.items():
        if name not in places:
            raise OptionError(
                f"--recipe {recipe}, line {number}: mtdata has no data set {name}; 'mtdata list -l "
                f"{'-'.join(_languages(name))}' tells what it has"
            )
        for url, path, mark, is_archive in places[name]:
            path, mark = Path(path), Path(mark)
            check = problem_with if is_archive else None
            if path.exists() and not mark.exists() and (check is None or check(path)):
                path.unlink()  # begun by mtdata; it is unknown how much is complete
            remedy = f"change line {number} of {recipe}, or give files you have with --from"
            downloads[path] = Download(url, path, check=check, remedy=remedy)
            marks.append(mark)
    download_all(list(downloads.values()), connections)
    for mark in marks:
        mark.touch()


def _write_pair(target, pair, names, recipe, cache):
    record = target / f"train.{pair}.datasets"
    record.unlink(missing_ok=True)
    first, second = pair.split("-")
    with (
        whole_file(target / f"train.{pair}.{first}") as first_out,
        whole_file(target / f"train.{pair}.{second}") as second_out,
        tqdm(desc=f"read {pair}", unit="sentence", unit_scale=True) as bar,
    ):
        for name, number in names.items():
            bar.set_postfix_str(name)
            outs = (first_out, second_out)
            if _languages(name) != [first, second]:
                outs = (second_out, first_out)
            before = bar.n
            blame = f"--recipe {recipe}, line {number}: {name}"
            with _mtdata(["-m", "mtdata", "echo", name], cache, blame) as output:
                for line in output:
                    sides = [side.strip() for side in line.split(b"\t")[:2]]
                    if len(sides) == 2 and all(sides):
                        for out, side in zip(outs, sides):
                            out.write(side + b"\n")
                        bar.update()
            if bar.n == before:
                raise OptionError(f"{blame} has no text; remove the line")
    write_whole(record, "".join(f"{name}\n" for name in names))


@contextmanager
def _mtdata(arguments, cache, blame):
    """The output of a child process. It runs in the cache folder, because mtdata imports
    ``mtdata*.py`` from the current folder.

    Raises:
        OptionError: begins with ``blame``, and has the last line of the process's messages.
    """
    # a wide terminal keeps the last line of the messages whole
    env = {**os.environ, "MTDATA": str(cache), "PYTHONUTF8": "1", "COLUMNS": "500"}
    command = [sys.executable, *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=messages, cwd=cache, env=env
        )
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            status = process.wait()
        if status != 0:
            messages.seek(0)
            reason = " ".join((messages.read().strip() or "no message").splitlines()[-1].split())
            raise OptionError(f"{blame}: mtdata fails ({reason}); change the recipe or run again")
