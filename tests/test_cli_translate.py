"""Train and translate through fairseq's commands: every row of the paper's tables learns."""

import json

import pytest
import toy_task
from toy_task import generate, interactive, run


def both_directions(text, lang):
    """``(source lines, reference lines)`` of the test set en-``lang``."""
    return [(text / f"test.en-{lang}.{side}").read_text().splitlines() for side in ("en", lang)]


@pytest.mark.parametrize("name", toy_task.MODELS)
def test_learns_the_toy_task_and_translates_it(name, data, trained):
    """BLEU of the hardest direction, in which the order of the words turns round."""
    assert generate(data, trained(name), "en-aa", scoring="sacrebleu").bleu > 90


def test_the_language_token_decides_the_target_language(data, text, trained):
    """Same source language, two target languages, one model."""
    sources, _ = both_directions(text, "aa")
    translations = interactive(data, trained("smoe"), sources[:10], "en-bb").sentences
    expected = [source.replace("en", "bb") for source in sources[:10]]
    found = [translations[i][1] for i in range(10)]
    assert all(word.startswith("bb") for line in found for word in line.split())
    assert sum(line == right for line, right in zip(found, expected)) >= 7


def test_interactive_translates_as_generate_does(data, text, trained):
    sources, _ = both_directions(text, "aa")
    from_generate = generate(data, trained("smoe"), "en-aa").sentences
    from_interactive = interactive(data, trained("smoe"), sources[:10], "en-aa").sentences
    assert len(from_generate) == len(sources) and len(from_interactive) == 10
    for i, (score, translation) in from_interactive.items():
        assert translation == from_generate[i][1]
        assert score == pytest.approx(from_generate[i][0], abs=1e-5)


@pytest.mark.parametrize("name", ["smoe", "switch", "cmr"])
def test_translation_does_not_depend_on_the_batch(name, data, trained):
    """One sentence at a time, without padding, or all of them in one padded batch."""
    alone = generate(data, trained(name), "en-aa", batch_size=1).sentences
    together = generate(data, trained(name), "en-aa", max_tokens=10000).sentences
    assert alone.keys() == together.keys()
    for i in alone:
        assert alone[i][1] == together[i][1]
        assert alone[i][0] == pytest.approx(together[i][0], abs=1e-5)


def test_requested_capacity_of_a_translation(data, trained, tmp_path):
    """--requested-capacity-file: between 1 and the number of strata, for every expert layer."""
    file = tmp_path / "capacity.json"
    generate(data, trained("smoe"), "en-aa", requested_capacity_file=file)
    capacity = json.loads(file.read_text())
    assert capacity["direction"] == "en-aa"
    assert capacity["sentences"] == toy_task.SPLIT_SIZES["test"]
    assert capacity["layers"].keys() == {"encoder.layers.1", "decoder.layers.1"}
    for passes in (capacity["encoder"], capacity["decoder"], *capacity["layers"].values()):
        assert 1 <= passes <= 4
    assert capacity["encoder"] == capacity["layers"]["encoder.layers.1"]


# --------------------------------------------------------------------------------------
# the commands of README.md, as they stand there


README_COMMANDS = {
    "train": """
        fairseq-train {data} --user-dir "$(python -m fairseq_smoe path)" --cpu
        --task smoe_translation --lang-pairs en-aa,en-bb,aa-en,bb-en
        --arch smoe_transformer_tiny --smoe-strata 4-4
        --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 --moe-gate-loss-wt 0.01
        --optimizer adam --adam-betas '(0.9,0.98)' --lr 1e-3
        --lr-scheduler inverse_sqrt --warmup-updates 100
        --max-tokens 1000 --max-update 5 --save-dir {save_dir}""",
    "generate": """
        fairseq-generate {data} --user-dir "$(python -m fairseq_smoe path)" --cpu
        --task smoe_translation --source-lang en --target-lang aa
        --path {save_dir}/checkpoint_last.pt --beam 4 --max-len-b 20 --scoring sacrebleu""",
    "interactive": """
        echo 'en1 en2 en3' | fairseq-interactive {data}
        --user-dir "$(python -m fairseq_smoe path)" --cpu
        --task smoe_translation --source-lang en --target-lang aa
        --path {save_dir}/checkpoint_last.pt --beam 4 --max-len-b 20""",
    "validate": """
        fairseq-validate {data} --user-dir "$(python -m fairseq_smoe path)" --cpu
        --task smoe_translation --lang-pairs en-aa,en-bb,aa-en,bb-en
        --path {save_dir}/checkpoint_last.pt --valid-subset valid --max-tokens 1000""",
}


def test_commands_of_the_readme(data, tmp_path):
    printed = {}
    for name, template in README_COMMANDS.items():
        command = " ".join(template.format(data=data, save_dir=tmp_path).split())
        outcome = run("bash", "-c", command)
        printed[name] = outcome.stdout + outcome.stderr
    assert (tmp_path / "checkpoint_last.pt").exists()
    assert "BLEU = " in printed["generate"]
    assert "H-0\t" in printed["interactive"]
    assert "nll_loss_en-aa" in printed["validate"] and "nll_loss_bb-en" in printed["validate"]
