"""A mistake is answered by one line that names the flag, the value and what would be right."""

import pytest
import torch
import toy_task
from toy_task import generate, set_up, train

from fairseq_smoe.errors import OptionError


def answer(outcome):
    """The line that a command ends with, after checking that it is the only one of its kind."""
    assert outcome.returncode != 0, outcome.tail()
    assert "Traceback" not in outcome.stdout + outcome.stderr, outcome.tail()
    assert "begin training epoch" not in outcome.stdout, outcome.tail()
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and outcome.stderr.endswith(lines[0] + "\n"), outcome.tail()
    return lines[0]


# options -> what the answer must name: flag, value and remedy
WRONG_OPTIONS = [
    (["--smoe-strata", "4-x"], ["--smoe-strata '4-x'", "as in 4-4-8"]),
    (["--smoe-strata", "4--4"], ["--smoe-strata '4--4'", "as in 4-4-8"]),
    (["--smoe-strata", "4,4"], ["--smoe-strata '4,4'", "as in 4-4-8"]),
    (["--smoe-strata", ""], ["--smoe-strata ''", "as in 4-4-8"]),
    (["--smoe-strata", "4-0-4"], ["--smoe-strata '4-0-4'", "1 or more"]),
    (
        ["--smoe-strata", "4-4", "--moe-expert-count", "16"],
        ["--moe-expert-count 16", "--smoe-strata 4-4", "8 experts"],
    ),
    (["--moe-expert-count", "0"], ["--moe-expert-count 0", "1 or more"]),
    (["--smoe-strata", "8", "--smoe-stacking"], ["--smoe-stacking", "8", "two strata"]),
    (["--smoe-strata", "4-4", "--post-norm"], ["--post-norm", "4-4", "drop --post-norm"]),
    (["--smoe-norm", "peper"], ["--smoe-norm peper", "paper or released"]),
    (
        ["--smoe-strata", "4-4", "--smoe-stacking", "--smoe-norm", "released"],
        ["--smoe-norm released", "--smoe-stacking"],
    ),
    (["--smoe-pass-scale", "1,x"], ["--smoe-pass-scale 1,x", "2 strata 4-4", "e.g. 1,0"]),
    (["--smoe-pass-scale", "1,0,0"], ["--smoe-pass-scale 1,0,0", "2 strata 4-4"]),
    (["--smoe-pass-scale", "nan"], ["--smoe-pass-scale nan", "2 strata 4-4"]),
    (
        ["--smoe-strata", "4-4", "--smoe-stacking", "--smoe-pass-scale", "1"],
        ["--smoe-pass-scale 1", "--smoe-stacking"],
    ),
    (["--smoe-pass-curriculum", "-1"], ["--smoe-pass-curriculum -1", "0 (none) or more"]),
    (
        ["--smoe-strata", "8", "--smoe-pass-curriculum", "9"],
        ["--smoe-pass-curriculum 9 with --smoe-strata 8", "drop --smoe-pass-curriculum"],
    ),
    (
        ["--smoe-strata", "4-4", "--smoe-stacking", "--smoe-pass-curriculum", "9"],
        ["--smoe-pass-curriculum 9 with --smoe-stacking"],
    ),
    (
        ["--moe-experts", "tensor-product", "--smoe-depth-init"],
        ["--smoe-depth-init with --moe-experts tensor-product", "ffn or sized"],
    ),
    (["--smoe-strata", "4-4", "--moe-freq", "3"], ["--moe-freq 3", "2+2 layers", "lower it"]),
    (["--smoe-strata", "4-4", "--moe-freq", "0"], ["--moe-freq 0", "without --smoe-strata"]),
    (["--moe-freq", "-1"], ["--moe-freq -1", "or more"]),
    (["--moe-eom", "1.0"], ["--moe-eom 1.0", "0 up to, but not, 1"]),
    (["--moe-eom=-0.1"], ["--moe-eom -0.1", "0 up to, but not, 1"]),
    (["--moe-cmr", "--cmr-gate-drop", "1"], ["--cmr-gate-drop 1.0", "0 up to, but not, 1"]),
    (["--moe-cmr", "--cmr-gate-loss-p", "2"], ["--cmr-gate-loss-p 2.0", "0 to 1"]),
    (["--moe-heads", "0"], ["--moe-heads 0", "1 or more"]),
    (["--moe-heads", "5"], ["--moe-heads 5", "a divisor of the model dim, 64"]),
    (
        ["--moe-heads", "16", "--moe-expert-backend", "grouped_mm"],
        ["grouped_mm with --encoder-embed-dim 64", "a multiple of 128"],
    ),
    (["--moe-heads", "2", "--moe-head-residual", "no"], ["--moe-head-residual no", "paper or"]),
    (
        ["--moe-heads", "2", "--moe-head-residual", "released", "--smoe-norm", "released"],
        ["--moe-head-residual released with --smoe-norm released", "drop one"],
    ),
    (["--moe-ffn-dim", "0"], ["--moe-ffn-dim 0", "1 or more"]),
    (
        ["--moe-ffn-dim", "100", "--moe-expert-backend", "grouped_mm"],
        ["grouped_mm with --moe-ffn-dim 100", "a multiple of 8"],
    ),
    (["--moe-capacity-factor=-2"], ["--moe-capacity-factor -2.0", "0 (no limit) or more"]),
    (["--moe-second-expert-policy", "best"], ["--moe-second-expert-policy best", "sampling"]),
    (
        ["--moe-gate-loss-combine-method", "max"],
        ["--moe-gate-loss-combine-method max", "average or sum"],
    ),
    (["--langs", "en,aa"], ["--langs en,aa", "bb is missing", "list every language"]),
    (["--lang-pairs", "en-aa,en-zz"], ["langs.txt", "zz is missing", "list every language"]),
    (["--lang-pairs", "en-aa,enbb"], ["--lang-pairs enbb", "one hyphen"]),
    (["--lang-dict", "nowhere.txt"], ["--lang-dict nowhere.txt", "no such file"]),
]


@pytest.mark.parametrize("words, named", WRONG_OPTIONS, ids=lambda words: " ".join(words))
def test_wrong_option(words, named, data):
    with pytest.raises(OptionError) as refusal:
        set_up(data, *words)
    message = str(refusal.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def test_right_options_are_not_refused(data):
    """The checks above refuse nothing that the paper's tables need."""
    for words in toy_task.MODELS.values():
        set_up(data, *words)


# --------------------------------------------------------------------------------------
# on the command line


def test_fairseq_train_answers_a_wrong_option_in_one_line(data, tmp_path):
    line = answer(train(data, tmp_path, "--smoe-strata", "4-0", check=False))
    assert "--smoe-strata '4-0'" in line and "1 or more" in line


def test_fairseq_train_answers_a_missing_data_folder_in_one_line(tmp_path):
    line = answer(train(tmp_path / "nowhere", tmp_path, check=False))
    assert f"{tmp_path}/nowhere" in line and "no such data folder" in line


def test_fairseq_train_answers_a_pair_without_files_before_it_builds_anything(data, tmp_path):
    outcome = train(data, tmp_path, lang_pairs="en-aa,aa-bb", check=False)
    line = answer(outcome)
    assert "--lang-pairs aa-bb: no train sentences" in line and "leave this direction out" in line
    assert "SMoETransformer" not in outcome.stdout + outcome.stderr


def test_fairseq_generate_answers_a_missing_language_in_one_line(data, short_run):
    line = answer(generate(data, short_run / "checkpoint_last.pt", "en-zz", check=False))
    assert "zz is missing" in line


def test_fairseq_generate_asks_for_the_direction(data, short_run):
    checkpoint = short_run / "checkpoint_last.pt"
    options = {"source_lang": None, "target_lang": None}
    line = answer(generate(data, checkpoint, check=False, **options))
    assert "--target-lang: give --source-lang and --target-lang to translate" in line


@pytest.mark.parametrize("way", ["resume", "finetune", "generate"])
def test_checkpoint_of_another_layout_is_refused(way, data, short_run, tmp_path):
    """Resumed in its --save-dir, taken as a start, or translated with other options."""
    checkpoint = short_run / "checkpoint_last.pt"
    if way == "resume":
        outcome = train(data, short_run, "--smoe-strata", "8", max_update=31, check=False)
    elif way == "finetune":
        outcome = train(
            data, tmp_path, "--smoe-strata", "8", finetune_from_model=checkpoint, check=False
        )
    else:
        outcome = generate(data, checkpoint, model_overrides="{'smoe_strata': '8'}", check=False)
    line = answer(outcome)
    assert "--smoe-strata" in line and "coder.layers.1.expert_block" in line
    assert "strata 2-2-2-2" in line and "strata 8" in line


def test_nan_in_a_gate_stops_the_training_and_names_the_layer(data, short_run, tmp_path):
    state = torch.load(short_run / "checkpoint_last.pt", weights_only=False)
    state["model"]["decoder.layers.1.expert_block.gates.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "checkpoint_last.pt")
    outcome = train(data, tmp_path, *toy_task.MODELS["smoe"], max_update=40, check=False)
    assert outcome.returncode != 0, outcome.tail()
    last_line = outcome.stderr.splitlines()[-1]
    assert last_line.startswith("error: decoder.layers.1: the gate of stratum 1 gave NaN")
    assert "Traceback" not in outcome.stderr
    after = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert after["optimizer_history"][-1]["num_updates"] == 30, "nothing was saved over it"
