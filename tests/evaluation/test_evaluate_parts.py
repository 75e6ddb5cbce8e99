"""Parts of ``evaluate`` on their own: batches and memory, rows and checkpoints."""

from pathlib import Path

import pytest
import torch
import toy_task
from fairseq import options as fairseq_options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fairseq_smoe
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.training_command import training_command
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.batches import TokenBudget
from fairseq_smoe.evaluation.row_check import check_row
from fairseq_smoe.evaluation.saved_model import SavedModel, read_saved_model
from fairseq_smoe.evaluation.translator import Settings, Translator

fairseq_smoe.register()


def test_batches_hold_as_many_tokens_as_fit_the_longest_sentences_first():
    sizes = [3, 9, 4, 1, 9, 2, 30]
    batches = []
    TokenBudget(20).for_each_batch(sizes, lambda batch: batches.append(list(batch)))
    assert batches == [[6], [1, 4], [2, 0, 5, 3]]


def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered():
    """A memory of 25 tokens, counted as those of the padded batch."""
    sizes = [7, 7, 7, 7, 7, 5, 5, 5, 2]
    tried, done = [], []

    def process(batch):
        tried.append(len(batch))
        if len(batch) * max(sizes[i] for i in batch) > 25:
            raise torch.OutOfMemoryError
        done.extend(batch)

    budget = TokenBudget(1000)
    budget.for_each_batch(sizes, process)
    assert sorted(done) == list(range(len(sizes)))
    assert tried == [9, 4, 2, 2, 2, 2, 1]
    assert budget.tokens == 14
    tried.clear()
    budget.for_each_batch(sizes, process)
    assert tried == [2, 2, 2, 2, 1], "nothing is tried in vain again"


def test_a_sentence_that_does_not_fit_alone():
    def process(batch):
        raise torch.OutOfMemoryError

    with pytest.raises(OptionError, match="a sentence of 9 tokens does not fit"):
        TokenBudget(100).for_each_batch([4, 9], process)


def test_translations_and_capacity_are_those_of_a_larger_memory(data, trained):
    """Memory that ends in the middle of a batch: what was counted until then does not count."""
    model, task = read_saved_model(trained("smoe"), data).build(toy_task.DIRECTIONS)
    translator = Translator(model, task, Settings(2), torch.device("cpu"), TokenBudget(400))
    expected = translator.translate("en-aa", "test", lambda number: None)
    steps = []

    def end_of_memory(module, inputs, output):
        steps.append(inputs[0].shape[0])  # (sentences and their beams, D)
        if len(steps) > 2 and steps[-1] > 20:
            raise torch.OutOfMemoryError

    hook = model.decoder.layers[0].self_attn.out_proj.register_forward_hook(end_of_memory)
    progress = []
    found = translator.translate("en-aa", "test", progress.append)
    hook.remove()
    assert max(steps) > 20, "some batches were too large"
    assert sum(progress) == len(found.hypotheses) and max(progress) <= 10
    assert found.hypotheses == expected.hypotheses
    assert found.requested_capacity == expected.requested_capacity


def saved_with(words):
    """What a checkpoint of a training with these options holds of them."""
    parser = fairseq_options.get_training_parser()
    args = fairseq_options.parse_args_and_arch(parser, words)
    cfg = convert_namespace_to_omegaconf(args)
    return SavedModel(Path("checkpoint.pt"), {"cfg": {"model": cfg.model}})


@pytest.mark.parametrize("name", ["Dense", "Switch Transformer", "MoE+CMR", "SMoE-2-2-2-2"])
def test_a_checkpoint_is_of_its_own_row_and_of_no_other(name, data):
    """As ``train`` trains it, against all rows of the table."""
    benchmark = benchmarks.load("m4")
    row = benchmark.row(name)
    command = training_command(benchmark, row, "small", data, Path("run"), 42, 1000, 1, ["--cpu"])
    saved = saved_with(command[1:])
    for other in benchmark.rows:
        if other is row:
            check_row(benchmark, other, "small", saved)
            continue
        with pytest.raises(OptionError) as refusal:
            check_row(benchmark, other, "small", saved)
        assert other.slug in str(refusal.value) and "checkpoint.pt" in str(refusal.value)


def test_the_message_names_option_and_both_values(data):
    benchmark = benchmarks.load("m4")
    row = benchmark.row("MoE+EOM")
    command = training_command(
        benchmark, row, "small", data, Path("run"), 42, 1000, 1, ["--cpu", "--moe-eom", "0.3"]
    )
    with pytest.raises(
        OptionError, match="--moe-eom: .* trained with 0.3, .*moe-eom of m4 has 0.1"
    ):
        check_row(benchmark, row, "small", saved_with(command[1:]))
    same = ["--cpu", "--moe-gating-use-fp32"]
    command = training_command(benchmark, row, "small", data, Path("run"), 42, 1000, 1, same)
    check_row(benchmark, row, "small", saved_with(command[1:]))
