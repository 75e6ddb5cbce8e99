"""The steps from published corpora to binary files; each takes a :class:`Plan`.

fetch -> verify -> clean -> sentencepiece -> encode -> binarise -> report. A step that was
interrupted goes on from the files that are complete.
"""

import json
import shutil

import sentencepiece as spm
from tqdm import tqdm

from fairseq_smoe import benchmark as benchmarks
from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import binary, sources
from fairseq_smoe.preparation.clean import clean_pair, write_held_out
from fairseq_smoe.preparation.files import write_whole
from fairseq_smoe.preparation.parallel_text import collect
from fairseq_smoe.preparation.pool import in_parallel
from fairseq_smoe.preparation.report import write_report
from fairseq_smoe.preparation.verify import verify_pair
from fairseq_smoe.preparation.vocabulary import (
    train_sentencepiece,
    write_dictionary,
    write_sample,
)
from fairseq_smoe.task_files import LANGS_FILE

JOB_BYTES = 8_000_000  # text that a process encodes before it reports back


def fetch(plan):
    """Download what is not given with --from, and bring all text to ``work/raw``."""
    plan.raw.mkdir(exist_ok=True)
    codes = benchmarks.load(plan.benchmark).flores_codes() if plan.benchmark else {}
    places = list(plan.sources) or sources.fetch(plan)
    wanted = {(split, pair): prefix for split, prefix in plan.splits.items() for pair in plan.pairs}
    found = collect(places, plan.raw, wanted, codes)
    if codes and not any(split == "valid" for split, _ in found):
        places.append(sources.fetch_flores200(plan.downloads, plan.flores_address))
        collect(places, plan.raw, wanted, codes)
    _check_complete(plan)


def _check_complete(plan):
    where = f"--from {' '.join(plan.sources)}" if plan.sources else "the published text"
    found = plan.raw_splits()
    missing = [pair for pair in plan.pairs if pair not in found]
    if missing and (not found or not plan.skip_missing):
        some = ", ".join(missing[:10] + ["..."] * (len(missing) > 10))
        raise OptionError(
            f"{where}: no training text of {some}; {_expected_files(plan, 'train', missing[0])}, "
            "or give other --pairs or --skip-missing"
        )
    if not any("valid" in splits for splits in found.values()):
        raise OptionError(
            f"{where}: no text of split valid; {_expected_files(plan, 'valid', plan.pairs[0])}, or "
            "say with --splits valid=PREFIX how they are named"
        )


def _expected_files(plan, split, pair):
    prefix = plan.splits[split]
    return f"expected {prefix}.{pair}.* or opus.{pair}-{prefix}.*"


def verify(plan):
    """Both sides of every split have the same number of lines, in UTF-8."""
    strict = plan.rules.invalid_utf8 == "error"
    jobs = [
        (plan.raw, split, pair, strict)
        for pair, splits in plan.raw_splits().items()
        for split in splits
    ]
    in_parallel(verify_pair, jobs, plan.workers, "verify", "text")


def clean(plan):
    """Drop what the rules say."""
    folder = plan.clean
    folder.mkdir(exist_ok=True)
    found = plan.raw_splits()
    for lang in tqdm(plan.languages(found), desc="held-out text", unit="language"):
        if not (folder / f"held-out.{lang}.npy").exists():
            paths = [
                plan.raw / f"{split}.{pair}.{lang}"
                for pair, splits in found.items()
                for split in splits
                if lang in pair.split("-") and split != "train"
            ]
            write_held_out(paths, folder / f"held-out.{lang}.npy")
    jobs = [
        (pair, plan.raw, folder, splits, plan.rules) for pair, splits in _largest_first(plan, found)
    ]
    in_parallel(clean_pair, jobs, plan.workers, "clean", "pair")


def _largest_first(plan, found):
    def size(item):
        return (plan.raw / f"train.{item[0]}.{item[0].split('-')[1]}").stat().st_size

    return sorted(found.items(), key=size, reverse=True)


def sentencepiece(plan):
    """Train the joint vocabulary; write the dictionary and the list of languages."""
    pairs = list(plan.clean_splits())
    files = {lang: [] for lang in plan.languages(pairs)}
    lines = {}
    for pair in pairs:
        for lang in pair.split("-"):
            path = plan.clean / f"train.{pair}.{lang}"
            files[lang].append(path)
            lines[path] = _clean_counts(plan, pair)["train"]["kept"]["lines"]
    if not plan.sample.exists():
        write_sample(files, lines, plan.sample, plan.temperature, plan.sample_lines, plan.seed)
    if not plan.model.exists():
        try:
            train_sentencepiece(plan.sample, plan.model, plan.vocab_size, plan.character_coverage)
        except OptionError:
            plan.sample.unlink()  # other options may make another one
            raise
    langs = plan.languages(pairs)
    write_dictionary(_model(plan), langs, plan.dictionary)
    for lang in langs:  # fairseq reads one for each language
        write_whole(plan.target / f"dict.{lang}.txt", plan.dictionary.read_text(encoding="utf-8"))
    write_whole(plan.target / LANGS_FILE, "".join(f"{lang}\n" for lang in langs))


def encode(plan):
    """Turn text into the numbers of the dictionary, in chunks."""
    plan.ids.mkdir(exist_ok=True)
    jobs, job_bytes = [], JOB_BYTES
    for name in tqdm(_text_files(plan), desc="measure", unit="file"):
        bounds = binary.chunk_bounds(plan.clean / name)
        chunks = binary.chunk_files(plan.ids, name, len(bounds))
        for (start, stop), chunk in zip(bounds, chunks):
            if job_bytes >= JOB_BYTES:
                jobs.append([])
                job_bytes = 0
            jobs[-1].append((plan.clean / name, start, stop, chunk))
            job_bytes += stop - start
    dtype = binary.token_type(_dictionary_size(plan))
    in_parallel(
        binary.encode_chunks,
        [(job, plan.model, dtype) for job in jobs],
        plan.workers,
        "encode",
        "chunk",
    )


def binarise(plan):
    """Join the chunks to the files that fairseq reads, and count tokens."""
    names = _text_files(plan)
    jobs = []
    for name in names:
        chunks = sorted(plan.ids.glob(f"{name}.[0-9]*.npz"))
        split, pair, _ = name.split(".")
        lines = _clean_counts(plan, pair)[split]["kept"]["lines"]
        shards = plan.shards(name, lines)
        for shard in shards:
            shard.parent.mkdir(exist_ok=True)
        jobs.append((chunks, shards))
    counts = in_parallel(binary.binarise, jobs, plan.workers, "binarise", "file")
    write_whole(plan.counts, json.dumps(dict(zip(names, counts))) + "\n")


def report(plan):
    """Describe the data in ``report.md``, ``report.json`` and pictures."""
    cleaning = {pair: _clean_counts(plan, pair) for pair in plan.clean_splits()}
    tokens = json.loads(plan.counts.read_text(encoding="utf-8"))
    write_report(plan, cleaning, tokens)


def forget_output(plan, first):
    """Delete what ``first`` and all later steps have written; downloads stay."""
    outputs = {
        "fetch": [plan.raw],
        "verify": [],
        "clean": [plan.clean],
        "sentencepiece": [
            *(plan.sample, plan.model, plan.target / LANGS_FILE),
            *plan.target.glob("dict*.txt"),
        ],
        "encode": [plan.ids],
        "binarise": [
            plan.counts,
            *(path for end in ("bin", "idx") for path in plan.target.glob(f"*.{end}")),
            *plan.target.glob("shard[0-9]*"),
        ],
        "report": list(plan.target.glob("report*")),
    }
    names = list(outputs)
    for name in names[names.index(first) :]:
        for path in outputs[name]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _text_files(plan):
    """``["train.en-de.de", ...]``, the largest first."""
    names = [
        f"{split}.{pair}.{lang}"
        for pair, splits in plan.clean_splits().items()
        for split in splits
        for lang in pair.split("-")
    ]
    return sorted(names, key=lambda name: -(plan.clean / name).stat().st_size)


def _clean_counts(plan, pair):
    return json.loads((plan.clean / f"{pair}.json").read_text(encoding="utf-8"))


def _model(plan):
    return spm.SentencePieceProcessor(model_file=str(plan.model))


def _dictionary_size(plan):
    with open(plan.dictionary, encoding="utf-8") as handle:
        return sum(1 for _ in handle) + 4  # with the special tokens that fairseq adds
