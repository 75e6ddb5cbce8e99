"""Text to translate is read line by line, whatever bytes are in it."""

import io
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_smoe.errors import OptionError
from fairseq_smoe.generation.text_lines import MOST_WARNINGS, TextLines

SPECIAL = [b"\r", b"\x0b\x0c\x1c\x1e\x85", "\u2028\u2029\x85\ufeff".encode(), b"\xe9", b"\0"]
LINES = st.lists(
    st.lists(st.one_of(st.sampled_from([*SPECIAL, b"a", b" "]), st.binary(max_size=4)), max_size=5)
    .map(b"".join)
    .map(lambda line: line.replace(b"\n", b""))
)


def read_stdin(content, monkeypatch, size=1):
    stdin = types.SimpleNamespace(buffer=io.BytesIO(content))
    monkeypatch.setattr(sys, "stdin", stdin)
    return list(TextLines("-").buffers(size))


@given(lines=LINES, last_end=st.sampled_from([b"\n", b""]), size=st.integers(1, 7))
def test_every_line_comes_out_once_and_in_order(lines, last_end, size):
    content = b"\n".join(lines) + (last_end if lines else b"")
    # what follows the last newline is a line if there is anything in it but a byte order mark
    if lines and not last_end and lines[-1] in (b"", b"\xef\xbb\xbf"):
        lines = lines[:-1]
    expected = [
        line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace").strip()
        for line in lines
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        buffers = read_stdin(content, monkeypatch, size)
    assert sum(buffers, []) == expected
    assert all(len(buffer) == size for buffer in buffers[:-1])
    assert all(0 < len(buffer) <= size for buffer in buffers)


def test_a_file_is_read_as_a_pipe_is(tmp_path, monkeypatch):
    content = "\ufeffone\r\ntwo\u2028three\n\n \x85\nfour\rfive".encode()
    (tmp_path / "text").write_bytes(content)
    found = list(TextLines(str(tmp_path / "text")))
    assert found == ["one", "two\u2028three", "", "", "four\rfive"]
    assert [[line] for line in found] == read_stdin(content, monkeypatch)


def test_what_a_program_has_put_in_place_of_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ncaf\u00e9\u2028"))
    assert list(TextLines("-")) == ["one", "caf\u00e9"]


def test_bytes_that_are_no_utf8_are_named(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(b"one\ncaf\xe9 noir\nthree\n")
    assert list(TextLines(str(path))) == ["one", "caf\ufffd noir", "three"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}, line 2: byte 4, 0xe9, is not UTF-8")


def test_many_bad_lines_do_not_flood_the_screen(monkeypatch, capsys):
    assert len(read_stdin(b"\xff\n" * 1000, monkeypatch)) == 1000
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == MOST_WARNINGS + 1
    assert warnings[-1] == "warning: standard input: 1000 lines are not UTF-8"


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read(name, tmp_path):
    with pytest.raises(OptionError, match="--input .*: (No such file|Is a directory)"):
        list(TextLines(str(tmp_path / name)))
