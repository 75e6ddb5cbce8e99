"""A training on as many directions as OPUS-100 has starts quickly and in little memory."""

import json
import sys

from toy_task import run, train_command, write_binarised, write_dictionaries

PAIRS = [f"en-x{i:02d}" for i in range(98)]
MOST_SECONDS = 60
MOST_BYTES = 4 * 2**30

# runs a command; prints how long it took and the largest resident set (kilobytes on Linux)
MEASURE = """
import json, resource, subprocess, sys, time
began = time.monotonic()
subprocess.run(sys.argv[1:], check=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"seconds": time.monotonic() - began, "bytes": usage.ru_maxrss * 1024}))
"""


def test_196_directions_with_64k_words_start_in_a_minute_and_4_gib(tmp_path):
    data = tmp_path / "data-bin"
    write_dictionaries(data, ["en", *(pair[3:] for pair in PAIRS)], num_words=64_000)
    for i, pair in enumerate(PAIRS):
        write_binarised(data, "train", pair, 30 + i, word=i)
        if i:  # one pair has too little text to validate on
            write_binarised(data, "valid", pair, 2, word=i)
    directions = [d for pair in PAIRS for d in (pair, f"{pair[3:]}-en")]
    command = train_command(
        data,
        tmp_path,
        lang_pairs=",".join(directions),
        max_update=2,
        log_interval=1,
        no_save=True,
    )
    outcome = run(sys.executable, "-c", MEASURE, *command)
    assert [record["num_updates"] for record in outcome.log("train_inner")] == [1, 2]
    validated = {name for name in outcome.log("valid")[0] if name.startswith("valid_nll_loss_")}
    assert validated == {f"valid_nll_loss_{direction}" for direction in directions[2:]}
    measured = json.loads(outcome.stdout.splitlines()[-1])
    assert measured["seconds"] < MOST_SECONDS, measured
    assert measured["bytes"] < MOST_BYTES, measured
