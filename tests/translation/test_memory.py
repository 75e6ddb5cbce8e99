"""What keeping freed memory does to page faults, in processes of their own."""

import json

import toy_task

COUNT = """
import json, resource, sys
from fairseq_smoe.translation.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)  # 80 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([faults() for _ in range(30)]))
"""


def count(word):
    return json.loads(toy_task.run("python", "-c", COUNT, word).stdout)


def test_memory_is_kept():
    """After a while: at first small things lie between the large ones."""
    first, *later = count("keep")
    assert first > 1000 and max(later[-10:]) < first / 10


def test_without_it_memory_is_got_every_time():
    first, *later = count("leave")
    assert min(later) > first / 2


def test_settings_of_the_user_count(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    first, *later = count("keep")
    assert min(later) > first / 2
