"""A model is merged within twice its memory."""

import pytest
from test_checkpoint_memory import Loading, large  # noqa: F401

CONVERT = """
import sys
from fairseq_smoe.__main__ import main
from fairseq_smoe.evaluation import set_up_fairseq
set_up_fairseq()
from fairseq_smoe.conversion import fewer_experts
def wait_after(name):
    print(name, flush=True)
    sys.stdin.readline()
wait_after("ready")
sys.stdout = sys.stderr
words = ["convert", "merge-experts", sys.argv[1], sys.argv[1] + ".merged", "--strata", "4-4-4"]
main([*words, "--align", "--merge", "learned", "--epochs", "1", "--max-sentences", "10"])
sys.stdout = sys.__stdout__
wait_after("converted")
"""


@pytest.mark.slow
def test_merging_needs_at_most_two_copies_of_the_model(large):  # noqa: F811
    path, model, _ = large
    converting = Loading(path, CONVERT)
    try:
        assert converting._line() == "ready"
        before = converting.memory()
        needed = converting.reach("converted") - before
        print(f"{needed / model:.2f} times the model")
        assert needed < 2 * model
    finally:
        converting.process.kill()
        converting.process.communicate()
