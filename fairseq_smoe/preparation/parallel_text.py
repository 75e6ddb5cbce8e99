"""Finding the two files of every language pair in folders and archives of several layouts."""

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import whole_file, write_whole
from fairseq_smoe.preparation.archives import (
    SUFFIXES,
    DamagedArchive,
    is_archive,
    refuse,
    visit_members,
)

# prefix -> the folder and ending in Flores-200
FLORES_FOLDERS = {"dev": "dev", "test": "devtest"}
FLORES_ENGLISH = {"en": "eng_Latn", "eng": "eng_Latn"}
FINISHED = "finished.json"


def collect(sources, target, wanted, flores_codes=None):
    """Collect the text of language pairs as ``target/SPLIT.A-B.LANG``.

    Args:
        sources: folders and archives, searched to any depth; the first one with a pair is used.
        target: folder for symbolic links to the text. Text from archives is unpacked to
            ``target/unpacked``.
        wanted: ``{(split, "A-B"): prefix of the files}``, see :func:`layouts`.
        flores_codes: ``{language: its name in Flores-200}``; English is known.

    Returns:
        The set of ``(split, "A-B")`` that were found.

    Raises:
        OptionError: a source is missing, damaged or ambiguous, or has only one side of a pair.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for split, pair in wanted:  # links of an earlier call, whose sources may have had more
        for lang in pair.split("-"):
            path = target / f"{split}.{pair}.{lang}"
            if path.is_symlink():
                path.unlink()
    sources = [check_source(source) for source in sources]
    found = set()
    for source in sources:
        missing = {
            (split, pair): layouts(prefix, pair, flores_codes)
            for (split, pair), prefix in wanted.items()
            if (split, pair) not in found
        }
        layouts_of_all = [sides for options in missing.values() for sides in options]
        names = {name for sides in layouts_of_all for name in sides.values()}
        if not names:
            break
        search = _search if source.is_dir() else _unpack
        files = search(source, names, target)
        for (split, pair), options in missing.items():
            sides = _best_layout(source, options, files)
            for lang, name in sides.items():
                _link(files[name], target, f"{split}.{pair}.{lang}")
            if sides:
                found.add((split, pair))
    return found


def layouts(prefix, pair, flores_codes=None):
    """The possible names of a pair's files, ``[{language: name}]``, best first. Names in Flores-200
    include the folder."""
    first, second = pair.split("-")
    orders = (f"{first}-{second}", f"{second}-{first}")
    langs = (first, second)
    options = [{lang: f"{prefix}.{order}.{lang}" for lang in langs} for order in orders]
    options += [{lang: f"opus.{order}-{prefix}.{lang}" for lang in langs} for order in orders]
    codes = FLORES_ENGLISH | flores_codes if flores_codes else {}
    if prefix in FLORES_FOLDERS and all(lang in codes for lang in langs):
        folder = FLORES_FOLDERS[prefix]
        options.append({lang: f"{folder}/{codes[lang]}.{folder}" for lang in langs})
    return options


def _best_layout(source, options, files):
    """The first layout whose files exist; ``{}`` if there is none."""
    for sides in options:
        there = [name for name in sides.values() if name in files]
        if there and len(there) < len(sides):
            missing = next(name for name in sides.values() if name not in files)
            raise OptionError(
                f"--from {source}: has {there[0]} but not {missing}, the other side of the text"
            )
        if there:
            return sides
    return {}


def check_source(source):
    """The path of a source, if it can be searched.

    Raises:
        OptionError: it is missing, or neither a folder nor an archive.
    """
    source = Path(source)
    if not source.exists():
        raise OptionError(f"--from {source}: no such file or folder")
    if not source.is_dir() and not (source.is_file() and is_archive(source)):
        raise OptionError(f"--from {source}: neither a folder nor an archive ({SUFFIXES})")
    return source


def _search(source, names, target):
    """``{name: path}`` of the wanted files in a folder."""

    def unreadable(error):
        raise OptionError(f"--from {source}: {error.filename}: {error.strerror}") from error

    files, seen = {}, {target.resolve()}  # the target itself is not searched
    for folder, subfolders, entries in os.walk(source, onerror=unreadable, followlinks=True):
        folder = Path(folder)
        if folder.resolve() in seen:  # symbolic links may form cycles
            subfolders.clear()
            continue
        seen.add(folder.resolve())
        subfolders.sort()
        for entry in sorted(entries):
            path = folder / entry
            name = _wanted_name(path, names)
            if name is None or not path.is_file():
                continue
            if not path.samefile(files.setdefault(name, path.absolute())):
                raise _ambiguous(source, files[name], path)
    return files


def _wanted_name(path, names):
    """The wanted name that a file matches, or None."""
    if "__MACOSX" in path.parts or path.name.startswith("._"):
        return None  # metadata of macOS about a file of that name
    for name in (path.name, "/".join(path.parts[-2:])):
        if name in names:
            return name
    return None


def _ambiguous(source, first, second):
    return OptionError(
        f"--from {source}: both {str(first)!r} and {str(second)!r}; give the folder of one, or "
        "remove the other"
    )


def _unpack(archive, names, target):
    """As :func:`_search`, for an archive: extracts the wanted files, once."""
    state = archive.stat()
    identity = f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}"
    # extracted from this version of the archive, and can be kept
    version = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = target / "unpacked" / f"{archive.name}-{version}"
    if not _is_unpacked(folder, names):
        for orphan in folder.rglob("*.unfinished-[0-9]*"):  # of a killed run
            orphan.unlink()
        members = {}

        def extract(member):
            name = None if member.is_folder else _wanted_name(PurePosixPath(member.path), names)
            if name is None:
                return
            if not member.is_file:
                refuse(archive, f"{member.path!r} is a link or device")
            if name in members:
                raise _ambiguous(archive, members[name], member.path)
            members[name] = member.path
            path = folder / name
            if not path.exists():  # else of an earlier call, and complete
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.open() as text, whole_file(path) as out:
                    shutil.copyfileobj(text, out, 1 << 20)

        try:
            visit_members(archive, f"read {archive.name}", extract)
        except DamagedArchive:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "archive": str(archive.resolve()),
            "bytes": state.st_size,
            "modified_ns": state.st_mtime_ns,
            "looked_for": sorted(names),
            "members": members,
        }
        write_whole(folder / FINISHED, json.dumps(record, indent=1) + "\n")
    return {name: folder / name for name in names if (folder / name).exists()}


def _is_unpacked(folder, names):
    """Whether all files that the archive has of ``names`` are extracted."""
    finished = folder / FINISHED
    if not finished.exists():
        return False
    record = json.loads(finished.read_text(encoding="utf-8"))
    return names <= set(record["looked_for"]) and all(
        (folder / name).exists() for name in record["members"]
    )


def _link(path, target, name):
    """Make a symbolic link, atomically replacing an older one."""
    part = target / f"{name}.unfinished-{os.getpid()}"
    part.unlink(missing_ok=True)
    inside = path.is_relative_to(target)
    part.symlink_to(path.relative_to(target) if inside else path)
    os.replace(part, target / name)
