"""``evaluate`` on several ranks: each translates its share, the first puts them together."""

import json
import time
import uuid

from fairseq_smoe.evaluation.parts import PartFiles
from fairseq_smoe.evaluation.ranks import PLAN, SHARE_DONE
from fairseq_smoe.evaluation.shares import divide
from fairseq_smoe.files import remove_unfinished, write_whole


def translate_on_ranks(ranks, translator, folders, keys, jobs, progress):
    """Yield ``(job, Translation)`` of every job, as ``translate_in_turn`` does, on the first rank.

    Args:
        ranks: :class:`~fairseq_smoe.evaluation.ranks.Ranks`
        folders: ``{subset: folder for parts}``, which all ranks can see.
        keys: ``{job: what its translations depend on}``

    Raises:
        LostRankError: another rank has died or cannot be reached.
    """
    files = {job: PartFiles(str(folders[job[1]]), job[0], keys[job]) for job in jobs}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
        remove_unfinished(folder)
        for plan in folder.glob("plan-*"):  # of a command that was killed
            plan.unlink()
    opened = {job: translator.open(*job) for job in jobs}
    missing = {}
    for job, test_set in opened.items():
        test_set.warn()
        sizes = dict(enumerate(test_set.sizes))
        for part in files[job].read():
            progress(len(part.indices))
            for index in part.indices:
                del sizes[index]
        missing[job] = sizes
    whole = translator.settings.max_len_a != 0
    shares = divide(missing, translator.budget.tokens, ranks.size, whole)
    plan = {
        "name": uuid.uuid4().hex[:12],
        "files": [[str(each.folder), each.direction, each.key] for each in files.values()],
        "jobs": jobs,
        "shares": [[[jobs.index(job), part] for job, part in share] for share in shares],
    }
    path = next(iter(folders.values())) / f"plan-{plan['name']}"
    write_whole(path, json.dumps(plan))
    ranks.tell(PLAN, str(path))
    others = 0

    def count(number):
        nonlocal others
        ranks.count(number)
        before, others = others, ranks.counted()
        progress(number + others - before)

    _translate_share(ranks, translator, plan, opened, count)
    for rank in range(1, ranks.size):
        while ranks.asked(SHARE_DONE.format(rank)) is None:
            ranks.check_life(rank)
            count(0)
            time.sleep(0.1)
        for name in json.loads(ranks.ask(SHARE_DONE.format(rank), rank)):
            ranks.read_file(name, rank)
    count(0)
    for job in jobs:
        yield job, translator.join(opened[job], files[job].read())
        files[job].remove()
    path.unlink()
    ranks.hide_folder()
    for folder in folders.values():
        if not any(folder.iterdir()):
            folder.rmdir()


def help_the_first(ranks, translator):
    """What the other ranks do."""
    plan = json.loads(ranks.read_file(ranks.ask(PLAN)))
    written = _translate_share(ranks, translator, plan, {}, ranks.count)
    ranks.tell(SHARE_DONE.format(ranks.rank), json.dumps(written[-1:]))


def _translate_share(ranks, translator, plan, opened, progress):
    """Returns the files that are written."""
    written = []
    for number, (job, indices) in enumerate(plan["shares"][ranks.rank]):
        key = tuple(plan["jobs"][job])
        if key not in opened:
            opened = {key: translator.open(*key)}  # the units of a job follow one another
        files = PartFiles(*plan["files"][job])
        part = translator.translate_some(opened[key], indices, progress)
        written.append(str(files.write(f"{plan['name']}-{ranks.rank}-{number}", part)))
    return written
