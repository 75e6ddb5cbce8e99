"""Parallel text from folders and archives, whole and broken ones."""

import gzip
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import archives
from fairseq_smoe.preparation.parallel_text import collect

WANTED = {
    ("train", "eng-nso"): "train",
    ("valid", "eng-nso"): "dev",
    ("test", "eng-nso"): "test",
    ("train", "eng-tgl"): "train",
    ("test", "eng-tgl"): "test",
}
CODES = {"nso": "nso_Latn", "tgl": "tgl_Latn"}
DIRECT = {
    "m15/train.eng-nso.eng": "hello\n",
    "m15/train.eng-nso.nso": "dumela\n",
    "m15/deep/dev.nso-eng.eng": "dev\n",
    "m15/deep/dev.nso-eng.nso": "dev nso\n",
    "m15/train.eng-nso.eng.gz": "not wanted\n",
}
FLORES = {
    f"flores200_dataset/{folder}/{code}.{folder}": f"{code} {folder}\n"
    for folder in ("dev", "devtest")
    for code in ("eng_Latn", "nso_Latn", "tgl_Latn", "zul_Latn")
}
OPUS = {
    "opus-100-corpus/v1.0/supervised/eng-tgl/opus.eng-tgl-train.eng": "one\n",
    "opus-100-corpus/v1.0/supervised/eng-tgl/opus.eng-tgl-train.tgl": "isa\n",
}
TAR_MODES = {"tar": "w", "tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz", "tar.bz2": "w:bz2"}


def write_folder(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_archive(path, files):
    """``files``: {member: text, or a TarInfo or ZipInfo for what is no file}."""
    if path.name.endswith("zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path
    with tarfile.open(path, TAR_MODES[path.name.partition(".")[2]]) as archive:
        for name, text in files.items():
            if isinstance(text, tarfile.TarInfo):
                archive.addfile(text)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
    return path


def texts(target):
    """``{name: text}`` of what was collected."""
    return {path.name: path.read_text() for path in target.iterdir() if not path.is_dir()}


@pytest.mark.parametrize("kind", ["folder", "zip", *TAR_MODES])
def test_every_layout_from_every_kind_of_source(tmp_path, kind):
    files = DIRECT | FLORES | OPUS
    if kind == "folder":
        source = write_folder(tmp_path / "source", files)
    else:
        source = write_archive(tmp_path / f"source.{kind}", files)
    target = tmp_path / "target"
    assert collect([source], target, WANTED, CODES) == set(WANTED)
    assert texts(target) == {
        "train.eng-nso.eng": "hello\n",
        "train.eng-nso.nso": "dumela\n",
        "valid.eng-nso.eng": "dev\n",  # direct, and in the other order: better than Flores
        "valid.eng-nso.nso": "dev nso\n",
        "test.eng-nso.eng": "eng_Latn devtest\n",
        "test.eng-nso.nso": "nso_Latn devtest\n",
        "train.eng-tgl.eng": "one\n",
        "train.eng-tgl.tgl": "isa\n",
        "test.eng-tgl.eng": "eng_Latn devtest\n",
        "test.eng-tgl.tgl": "tgl_Latn devtest\n",
    }


def test_text_in_a_folder_is_not_copied(tmp_path):
    source = write_folder(tmp_path / "source", DIRECT)
    collect([source], tmp_path / "target", WANTED)
    link = os.readlink(tmp_path / "target" / "train.eng-nso.eng")
    assert link == str(source / "m15/train.eng-nso.eng")


def test_collected_text_of_an_archive_can_be_moved(tmp_path):
    collect([write_archive(tmp_path / "a.zip", DIRECT)], tmp_path / "target", WANTED)
    (tmp_path / "target").rename(tmp_path / "moved")
    assert texts(tmp_path / "moved")["train.eng-nso.eng"] == "hello\n"


def test_what_is_missing_is_not_found(tmp_path):
    source = write_folder(tmp_path / "source", OPUS | FLORES)
    assert collect([source], tmp_path / "target", WANTED) == {("train", "eng-tgl")}


def test_first_source_wins(tmp_path):
    first = write_archive(tmp_path / "first.tgz", DIRECT)
    again = {name: "other\n" for name in DIRECT}
    second = write_folder(tmp_path / "second", again | OPUS)
    found = collect([first, second], tmp_path / "target", WANTED)
    assert {pair for _, pair in found} == {"eng-nso", "eng-tgl"}
    collected = texts(tmp_path / "target")
    assert "other\n" not in collected.values() and collected["train.eng-tgl.eng"] == "one\n"


def test_other_sources_the_second_time(tmp_path):
    target = tmp_path / "target"
    collect([write_archive(tmp_path / "first.zip", DIRECT)], target, WANTED)
    other = {name: f"other {text}" for name, text in DIRECT.items()}
    collect([write_archive(tmp_path / "second.zip", other)], target, WANTED)
    assert texts(target)["train.eng-nso.eng"] == "other hello\n"
    collect([write_folder(tmp_path / "third", OPUS)], target, WANTED)
    assert set(texts(target)) == {"train.eng-tgl.eng", "train.eng-tgl.tgl"}


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OptionError, match=f"--from {tmp_path}: {tmp_path}: Permission denied"):
        collect([tmp_path], tmp_path / "target", WANTED)


def test_dangling_link_is_no_text(tmp_path):
    source = write_folder(tmp_path / "source", DIRECT)
    (source / "m15/train.eng-nso.nso").unlink()
    (source / "m15/train.eng-nso.nso").symlink_to("gone")
    with pytest.raises(OptionError, match="but not train.eng-nso.nso"):
        collect([source], tmp_path / "target", WANTED)


def test_zip_with_backslashes(tmp_path):
    files = {name.replace("/", "\\"): text for name, text in DIRECT.items()}
    path = write_archive(tmp_path / "a.zip", files)
    assert len(collect([path], tmp_path / "target", WANTED)) == 2


def test_same_name_twice(tmp_path):
    twice = {**DIRECT, "copy/train.eng-nso.eng": "another\n"}
    sources = [write_folder(tmp_path / "f", twice), write_archive(tmp_path / "a.tar", twice)]
    for source in sources:
        with pytest.raises(OptionError) as error:
            collect([source], tmp_path / "target", WANTED)
        message = str(error.value)
        assert "copy/train.eng-nso.eng" in message and "m15/train.eng-nso.eng" in message


def test_notes_of_macos_are_no_text(tmp_path):
    notes = {"__MACOSX/m15/train.eng-nso.eng": "x", "m15/._train.eng-nso.eng": "x"}
    for source in (
        write_folder(tmp_path / "f", DIRECT | notes),
        write_archive(tmp_path / "a.zip", DIRECT | notes),
    ):
        collect([source], tmp_path / "target", WANTED)
        assert texts(tmp_path / "target")["train.eng-nso.eng"] == "hello\n"


def test_links_in_a_folder(tmp_path):
    source = write_folder(tmp_path / "elsewhere", DIRECT)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").symlink_to(source)
    (tmp_path / "source" / "again").symlink_to(source)
    (source / "circle").symlink_to(source)
    (source / "m15/alias").mkdir()
    (source / "m15/alias/train.eng-nso.eng").symlink_to(source / "m15/train.eng-nso.eng")
    assert len(collect([tmp_path / "source"], tmp_path / "target", WANTED)) == 2


def test_target_inside_a_source(tmp_path):
    source = write_folder(tmp_path / "source", DIRECT)
    for _ in range(2):
        assert len(collect([source], source / "prepared", WANTED)) == 2


def test_one_side_only(tmp_path):
    files = {"m15/train.eng-nso.eng": "hello\n"}
    for source in (write_folder(tmp_path / "f", files), write_archive(tmp_path / "a.zip", files)):
        with pytest.raises(OptionError, match="has train.eng-nso.eng but not train.eng-nso.nso"):
            collect([source], tmp_path / "target", WANTED)
    assert not (tmp_path / "target" / "train.eng-nso.eng").exists()


def test_not_a_source(tmp_path):
    with pytest.raises(OptionError, match="--from .*missing: no such file"):
        collect([tmp_path / "missing"], tmp_path / "target", WANTED)
    (tmp_path / "a.zip").write_text("<html>too many requests</html>")
    with pytest.raises(OptionError, match="--from .*a.zip: neither a folder nor an archive"):
        collect([tmp_path / "a.zip"], tmp_path / "target", WANTED)


def test_the_name_of_an_archive_does_not_matter(tmp_path):
    path = write_archive(tmp_path / "a.tar.xz", DIRECT).rename(tmp_path / "download.zip")
    assert len(collect([path], tmp_path / "target", WANTED)) == 2


LONG = {
    "train.eng-nso.eng": random.Random(1).randbytes(60_000).hex(),
    "train.eng-nso.nso": random.Random(2).randbytes(60_000).hex(),
}


def check_damaged(path, target):
    with pytest.raises(OptionError, match="damaged archive.*get it again") as error:
        collect([path], target, WANTED)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert texts(target) == {} and list(target.rglob("*.eng*")) == []
    assert "damaged" in archives.problem_with(path)


@pytest.mark.parametrize("kind", ["zip", *TAR_MODES])
@pytest.mark.parametrize("share", [0.3, 0.9, "all but 5 bytes"])
def test_truncated_archive(tmp_path, kind, share):
    path = write_archive(tmp_path / f"a.{kind}", LONG)
    content = path.read_bytes()
    if kind == "tar":
        content = content.rstrip(b"\0")  # past the text, nothing but zeros is lost
    path.write_bytes(content[: -5 if share == "all but 5 bytes" else int(share * len(content))])
    check_damaged(path, tmp_path / "target")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz", "tar.bz2"])
def test_changed_bytes(tmp_path, kind):
    path = write_archive(tmp_path / f"a.{kind}", LONG)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    check_damaged(path, tmp_path / "target")


def test_wrong_checksum_at_the_end(tmp_path):
    path = write_archive(tmp_path / "a.tar.gz", LONG)
    content = bytearray(path.read_bytes())
    content[-6] ^= 0xFF  # of the CRC of the whole content
    path.write_bytes(content)
    check_damaged(path, tmp_path / "target")


def test_damaged_header_is_not_the_end(tmp_path):
    path = write_archive(tmp_path / "a.tar", LONG)
    content = bytearray(path.read_bytes())
    second = content.index(b"train.eng-nso.nso")
    content[second + 150] ^= 0xFF
    path.write_bytes(content)
    check_damaged(path, tmp_path / "target")


def test_zip_with_a_name_that_is_no_text(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ä", "text\n")
    path.write_bytes(path.read_bytes().replace("ä".encode(), b"\xff\xff"))
    check_damaged(path, tmp_path / "target")


@pytest.mark.parametrize("header", [{"GNU.sparse.size": "x"}, {"GNU.sparse.map": "a,b"}])
def test_tar_with_headers_that_make_no_sense(tmp_path, header):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("train.en-de.en")
        info.pax_headers = {**header, "path": info.name}
        archive.addfile(info)
    check_damaged(path, tmp_path / "target")


def test_compressed_but_no_archive(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"just text" * 100))
    check_damaged(tmp_path / "a.tar.gz", tmp_path / "target")


def link(name, kind, to="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    "name", ["../train.eng-nso.eng", "a/../../b", "/etc/train.eng-nso.eng", "a\\..\\b", "C:/a"]
)
def test_escaping_members(tmp_path, kind, name):
    path = write_archive(tmp_path / f"a.{kind}", {**DIRECT, name: "evil\n"})
    with pytest.raises(OptionError, match="damaged or malicious; get it from another place"):
        collect([path], tmp_path / "target", WANTED)
    assert texts(tmp_path / "target") == {} and list(tmp_path.rglob("*.eng")) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive(tmp_path, kind):
    name = "m15/train.eng-nso.eng"
    path = write_archive(tmp_path / "a.tar", {**DIRECT, name: link(name, kind)})
    with pytest.raises(OptionError, match=f"a.tar: '{name}' is a link or device"):
        collect([path], tmp_path / "target", WANTED)
    assert texts(tmp_path / "target") == {}
    harmless = write_archive(tmp_path / "b.tar", {**DIRECT, "x": link("x", kind)})
    assert len(collect([harmless], tmp_path / "target", WANTED)) == 2


def test_link_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("train.eng-nso.eng")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(OptionError, match="is a link or device"):
        collect([tmp_path / "a.zip"], tmp_path / "target", WANTED)


def test_finished_archive_is_not_read_again(tmp_path):
    path, target = write_archive(tmp_path / "a.tar.gz", DIRECT | FLORES), tmp_path / "target"
    for folder in (target, tmp_path / "other"):
        collect([path], folder, WANTED, CODES)
    before = texts(target)
    state = path.stat()
    path.write_bytes(path.read_bytes()[:100].ljust(state.st_size))  # unreadable from now on
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(collect([path], target, WANTED, CODES)) == 4 and texts(target) == before
    with pytest.raises(OptionError, match="damaged"):
        collect([path], target, WANTED | {("test1", "eng-zul"): "test"}, CODES)
    os.utime(path)
    with pytest.raises(OptionError, match="damaged"):
        collect([path], tmp_path / "other", WANTED, CODES)


def test_sigkill_while_extracting(tmp_path):
    count = 60
    files = {
        f"train.x{i}-en.{lang}": LONG["train.eng-nso.eng"]
        for i in range(count)
        for lang in ("en", f"x{i}")
    }
    path, target = write_archive(tmp_path / "a.tar.gz", files), tmp_path / "target"
    wanted = {("train", f"en-x{i}"): "train" for i in range(count)}
    code = f"""
from fairseq_smoe.preparation.parallel_text import collect
collect([{str(path)!r}], {str(target)!r}, {wanted!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    while len(complete := extracted(target)) < 5:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert texts(target) == {}
    complete = {file: file.stat().st_mtime_ns for file in extracted(target)}
    assert 5 <= len(complete) < 2 * count
    assert collect([path], target, wanted) == set(wanted)
    assert set(texts(target).values()) == {LONG["train.eng-nso.eng"]}
    assert complete == {file: file.stat().st_mtime_ns for file in complete}  # kept
    assert list(target.rglob("*.unfinished*")) == []


def extracted(target):
    return [file for file in Path(target).rglob("train.x*") if ".unfinished" not in file.name]
