"""fairseq-interactive: one line in, one line out, and a bad line never costs its neighbours."""

import re
import subprocess
import sys
import types

import pytest
import toy_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LONGEST = 30  # tokens of a source, with language token and end of sentence
GOOD = [b"en1 en2 en3", b"en4", b"en5 en6", b"en7 en0 en1 en2", b"en3 en3"]
EMPTY = [b"", b"  ", b"\t", b"\r", "\u2028\x85\u3000".encode(), b"\x0b\x0c"]
LONG = [b"en1 " * (LONGEST - 1), b"en2 " * 2000]
DAMAGED = [b"en1 caf\xe9", b"\xff", b"\xe2\x80 en2"]
ODD = ["en1\u2028en2".encode(), b"en1\ren2", b"en1 \0 en2", "\ufeffen4".encode(), b"__aa__", b"zz"]


def groups_of(output):
    """``[{"S": [...], "H": [...], "D": [...], "P": [...]}, ...]`` of every sentence, in order; what
    follows the number of the sentence. Checks that they are numbered in order, without gaps."""
    groups = []
    for line in output.split("\n"):
        if match := re.match(r"([SHDP])-(\d+)\t(.*)", line, re.DOTALL):
            if match[1] == "S":
                assert int(match[2]) == len(groups)
                groups.append({kind: [] for kind in "SHDP"})
            assert int(match[2]) == len(groups) - 1
            groups[-1][match[1]].append(match[3])
    assert all(len(group["S"]) == 1 for group in groups)
    return groups


def hypotheses(group):
    """``[(score, text), ...]``"""
    return [(float(score), text) for score, text in (h.split("\t") for h in group["H"])]


@pytest.fixture(scope="module")
def translate(data, trained):
    """``translate(content of a file, options)``: what the command prints, in this process."""
    from fairseq import options as fairseq_options
    from fairseq_cli import interactive

    import fairseq_smoe

    fairseq_smoe.register()
    checkpoint = trained("smoe")

    def translate(content, folder, capsys, *more, **options):
        path = folder / "text"
        path.write_bytes(content)
        options = {"input": path, "max_source_positions": LONGEST, **options}
        words = toy_task._translation_options(checkpoint, "en-aa", more, options)
        parser = fairseq_options.get_interactive_generation_parser()
        args = fairseq_options.parse_args_and_arch(parser, [str(data), *words])
        capsys.readouterr()
        interactive.main(args)
        return types.SimpleNamespace(**dict(zip(("out", "err"), capsys.readouterr())))

    return translate


LINES = st.lists(
    st.one_of(
        *map(st.sampled_from, (GOOD, EMPTY, LONG, DAMAGED, ODD)),
        st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def alone(translate, tmp_path_factory):
    """What becomes of each good line when there is no other; filled by the first test that asks."""
    known = {}

    def alone(line, capsys):
        if line not in known:
            folder = tmp_path_factory.mktemp("alone")
            (group,) = groups_of(translate(line + b"\n", folder, capsys).out)
            known[line] = hypotheses(group)[0]
        return known[line]

    return alone


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    lines=LINES,
    buffer_size=st.sampled_from([0, 1, 3, 100]),
    max_tokens=st.sampled_from([20, 2000]),
    nbest=st.sampled_from([1, 2]),
)
def test_outputs_align_with_lines(
    lines, buffer_size, max_tokens, nbest, translate, alone, tmp_path, capsys
):
    printed = translate(
        b"".join(line + b"\n" for line in lines),
        *(tmp_path, capsys),
        buffer_size=buffer_size,
        max_tokens=max_tokens,
        nbest=nbest,
    )
    groups = groups_of(printed.out)
    assert len(groups) == len(lines)
    for line, group in zip(lines, groups):
        assert [len(group[kind]) for kind in "HDP"] == [nbest] * 3
        score, text = hypotheses(group)[0]
        if line in GOOD:
            expected_score, expected = alone(line, capsys)
            assert text == expected
            assert score == pytest.approx(expected_score, abs=1e-5)
        if line in EMPTY:
            assert group["S"] == [""]
            assert hypotheses(group) == [(0, "")] * nbest
            assert group["P"] == ["0.0000"] * nbest
        words, scores = text.split(), group["P"][0].split()
        assert len(scores) == len(words) + 1 or "__" in group["S"][0]


def test_lines_that_are_too_long_are_shortened_and_named(translate, tmp_path, capsys):
    """The language token counts: 28 words, a language token and the end of the sentence fit."""
    words = [b"en1"] * LONGEST
    lines = [b" ".join(words[:n]) for n in (LONGEST - 2, LONGEST - 1)]
    printed = translate(b"\n".join([b"en4", b"", *lines]), tmp_path, capsys, buffer_size=100)
    fits, cut = groups_of(printed.out)[2:]
    assert fits["S"] == cut["S"] == [" ".join(["en1"] * (LONGEST - 2))]
    assert hypotheses(fits) == hypotheses(cut)
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"text, line 4: more than the {LONGEST} tokens" in warnings[0]


def test_another_task_is_left_alone(translate, tmp_path, capsys):
    """Its language token is printed, its empty line translated, as without the plugin."""
    options = {"task": "translation_multi_simple_epoch", "langs": ",".join(toy_task.LANGS)}
    options |= {"lang_pairs": "en-aa", "encoder_langtok": "tgt", "decoder_langtok": True}
    words, empty = groups_of(translate(b"en1\n\n", tmp_path, capsys, **options).out)
    assert words["S"] == ["__aa__ en1"] and empty["S"] == ["__aa__"]
    assert len(words["P"][0].split()) == len(hypotheses(words)[0][1].split()) + 2


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_no_line_no_output(content, translate, tmp_path, capsys):
    assert groups_of(translate(content, tmp_path, capsys).out) == []


def test_a_hint_where_the_text_is_not_in_pieces(translate, tmp_path, capsys):
    printed = translate(b"en1 x\ny z\nv\n", tmp_path, capsys)
    warnings = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "3 of 4 tokens so far are not in the vocabulary" in warnings[0]
    assert "--bpe sentencepiece --sentencepiece-model FILE" in warnings[0]
    assert "warning" not in translate(b"en1 x\ny en2\n", tmp_path, capsys).err


def test_text_in_pieces(translate, data, text, tmp_path, capsys):
    """A line that SentencePiece makes nothing of is an empty one."""
    import sentencepiece

    with open(text / "train.en-aa.en", encoding="utf-8") as lines:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(tmp_path / "spm"),
            vocab_size=24,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    options = {"bpe": "sentencepiece", "sentencepiece_model": tmp_path / "spm.model"}
    content = "en1\n\u200b\n\u00ad\nen2\n".encode()
    groups = groups_of(translate(content, tmp_path, capsys, buffer_size=100, **options).out)
    assert len(groups) == 4
    assert hypotheses(groups[1]) == [(0, "")]
    assert groups[0]["S"] != [""] and groups[3]["S"] != [""]


def test_the_command_reads_a_pipe_as_a_file(data, trained, tmp_path):
    lines = [*GOOD, *EMPTY, *DAMAGED, *ODD, b"en1 " * 1500, *GOOD]
    content = b"\xef\xbb\xbf" + b"\n".join(lines)
    (tmp_path / "text").write_bytes(content)
    options = toy_task._translation_options(trained("smoe"), "en-aa", (), {"buffer_size": 100})
    command = ["fairseq-interactive", str(data), *options]
    piped = subprocess.run(
        [f"{toy_task.COMMANDS}/{command[0]}", *command[1:]],
        input=content,
        capture_output=True,
        cwd=toy_task.REPOSITORY,
        # a locale that cannot print every translation
        env=toy_task.environment(PYTHONIOENCODING="ascii"),
    )
    assert piped.returncode == 0, piped.stderr.decode()
    groups = groups_of(piped.stdout.decode())
    assert len(groups) == len(lines)
    texts = [hypotheses(group)[0][1] for group in groups]
    assert texts[: len(GOOD)] == texts[-len(GOOD) :]
    from_file = toy_task.run(*command, "--input", tmp_path / "text")
    assert [g["H"] for g in groups_of(from_file.stdout)] == [g["H"] for g in groups]
    for name, printed in (
        ("standard input", piped.stderr.decode()),
        (str(tmp_path / "text"), from_file.stderr),
    ):
        warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
        first_damaged = len(GOOD) + len(EMPTY) + 1
        assert warnings[0].startswith(f"warning: {name}, line {first_damaged}: byte 8, 0xe9,")
        assert sum("is not UTF-8" in line for line in warnings) == len(DAMAGED)
        assert any(f"line {len(lines) - len(GOOD)}: more than the 1024" in w for w in warnings)
        assert "Traceback" not in printed


def test_python_m_reads_the_same(data, trained):
    options = toy_task._translation_options(trained("smoe"), "en-aa", (), {})
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.interactive", str(data), *options],
        input=b"en1\n\nen\xe9\n",
        capture_output=True,
        cwd=toy_task.REPOSITORY,
        env=toy_task.environment(),
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(groups_of(done.stdout.decode())) == 3
