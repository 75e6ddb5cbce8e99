"""The steps from published corpora to binary files; each takes a :class:`Plan` and what runs its
jobs, a pool (:mod:`~fairseq_smoe.preparation.pool`).

fetch -> verify -> clean -> sentencepiece -> encode -> binarise -> report. An interrupted step
resumes from the files that are complete. At its end a step writes a summary of its output to a
file, which later steps read: text that goes missing in between is an error.
"""

import json
from dataclasses import asdict

import sentencepiece as spm
from tqdm import tqdm

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.cleaning import in_words
from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import write_whole
from fairseq_smoe.preparation import binary, sources, too_long
from fairseq_smoe.preparation.clean import is_current, write_held_out
from fairseq_smoe.preparation.clean_pairs import clean_pairs
from fairseq_smoe.preparation.extended_vocabulary import extend, read_base
from fairseq_smoe.preparation.parallel_text import check_source, collect
from fairseq_smoe.preparation.report import overlap_in_words, write_report
from fairseq_smoe.preparation.verify import state_of, verify_pair
from fairseq_smoe.preparation.vocabulary import (
    FAIRSEQ_SPECIALS,
    joint_symbols,
    train_sentencepiece,
    write_dictionary,
    write_sample,
)
from fairseq_smoe.translation.task_files import LANGS_FILE, sentencepiece_file

JOB_BYTES = 8_000_000  # text that a process encodes before it reports back

# the steps whose summaries each step reads
NEEDS = {
    "fetch": (),
    "verify": ("fetch",),
    "clean": ("fetch", "verify"),
    "sentencepiece": ("clean",),
    "encode": ("clean",),
    "binarise": ("clean", "encode"),
    "report": ("clean", "binarise"),
}


def check_input(plan, step):
    """Check that the input of ``step`` is there, without reading all of it.

    Raises:
        OptionError: names what is missing.
    """
    needed = [plan.summary(earlier) for earlier in NEEDS[step]]
    if step in ("encode", "binarise"):
        needed.append(plan.model)
    for path in needed:
        if not path.exists():
            raise OptionError(f"{path}: is gone, and {step} needs it; give --redo fetch")
    if step == "fetch":
        for source in plan.sources:
            check_source(source)
    if step == "clean":
        for name, state in _summary(plan, "verify").items():
            path = plan.raw / name
            if state_of(path) != state:
                raise OptionError(
                    f"{path.resolve()}: has changed since it was verified; give --redo fetch"
                )


def fetch(plan, pool):
    """Download text that is not given with --from, and collect all text in ``work/raw``.

    Summary: ``{pair: [splits]}``.
    """
    plan.raw.mkdir(exist_ok=True)
    codes = benchmarks.load(plan.benchmark).flores_codes() if plan.benchmark else {}
    places = list(plan.sources) or sources.fetch(plan)
    wanted = {(split, pair): prefix for split, prefix in plan.splits.items() for pair in plan.pairs}
    splits = {split for split, _ in collect(places, plan.raw, wanted, codes)}
    if codes and "train" in splits and "valid" not in splits:
        places.append(sources.fetch_flores200(plan.downloads, plan.flores_address))
        collect(places, plan.raw, wanted, codes)
    found = plan.raw_splits()
    _check_complete(plan, found)
    _write_summary(plan, "fetch", found)


def _check_complete(plan, found):
    where = f"--from {' '.join(plan.sources)}" if plan.sources else "the published text"
    missing = [pair for pair in plan.pairs if pair not in found]
    if missing and (not found or not plan.skip_missing):
        some = ", ".join(missing[:10] + ["..."] * (len(missing) > 10))
        raise OptionError(
            f"{where}: no training text of {some}; {_expected_files(plan, 'train', missing[0])}, "
            f"or give other --pairs{' or --skip-missing' * bool(found)}"
        )
    if not any("valid" in splits for splits in found.values()):
        raise OptionError(
            f"{where}: no text of split valid, and training needs some; "
            f"{_expected_files(plan, 'valid', plan.pairs[0])}, or say with --splits valid=PREFIX "
            "how they are named"
        )
    if missing:
        print(f"fetch: no training text, and so left out: {', '.join(missing)}")
    for split in plan.splits:
        without = [pair for pair in found if split not in found[pair]]
        if without:
            print(f"fetch: no text of split {split}: {', '.join(without)}")


def _expected_files(plan, split, pair):
    prefix = plan.splits[split]
    return f"expected {prefix}.{pair}.* or opus.{pair}-{prefix}.*"


def verify(plan, pool):
    """Check that both sides of every split have the same number of lines, in UTF-8.

    Summary: ``{file: [bytes, time of its last change]}``.
    """
    strict = plan.rules.invalid_utf8 == "error"
    jobs = [
        (plan.raw, split, pair, strict)
        for pair, splits in _summary(plan, "fetch").items()
        for split in splits
    ]
    states = pool.map(verify_pair, jobs, "verify", "text")
    _write_summary(plan, "verify", {name: s for state in states for name, s in state.items()})


def clean(plan, pool):
    """Drop pairs by the rules. Summary: ``{pair: {split: counts}}``."""
    hint = ""
    if plan.benchmark and plan.cleaning == "none":
        hint = ", as the published text is kept; --clean default cleans text of your own"
    print(f"clean: rules {in_words(plan.cleaning, asdict(plan.rules))}{hint}", flush=True)
    folder = plan.clean
    folder.mkdir(exist_ok=True)
    found, verified = _summary(plan, "fetch"), _summary(plan, "verify")
    for lang in tqdm(plan.languages(found), desc="held-out text", unit="language"):
        if not (folder / f"held-out.{lang}.npy").exists():
            paths = [
                plan.raw / f"{split}.{pair}.{lang}"
                for pair, splits in found.items()
                for split in splits
                if lang in pair.split("-") and split != "train"
            ]
            write_held_out(paths, folder / f"held-out.{lang}.npy")

    counts = clean_pairs(plan, pool, found, verified)
    _write_summary(plan, "clean", counts)
    kept, overlap = (
        sum(splits["train"][name]["lines"] for splits in counts.values())
        for name in ("kept", "in_held_out")
    )
    if overlap:
        print(f"clean: {overlap_in_words(overlap, kept)}; --held-out drop leaves them out")


def sentencepiece(plan, pool):
    """Train the joint vocabulary, or extend one; write the dictionary and the list of languages."""
    cleaned = _summary(plan, "clean")
    langs = plan.languages(cleaned)
    files, lines = {lang: [] for lang in langs}, {}
    for pair in plan.pairs:
        for lang in pair.split("-") if pair in cleaned else ():
            path = plan.clean / f"train.{pair}.{lang}"
            files[lang].append(path)
            lines[path] = cleaned[pair]["train"]["kept"]["lines"]
    if plan.vocabulary_of:
        base = read_base(plan.vocabulary_of)
        for lang in base.new_languages(langs) if plan.vocab_size else ():
            own = {lang: files[lang]}
            _train_model(plan, pool, own, lines, plan.target / f"spm.{lang}.model")
        symbols = extend(base, langs, plan.target)
        langs = base.languages + base.new_languages(langs)
    else:
        _train_model(plan, pool, files, lines, plan.model)
        symbols = joint_symbols(spm.SentencePieceProcessor(model_file=str(plan.model)), langs)
    write_dictionary(symbols, plan.dictionary)
    for lang in langs:  # fairseq reads one for each language
        write_whole(plan.target / f"dict.{lang}.txt", plan.dictionary.read_text(encoding="utf-8"))
    write_whole(plan.target / LANGS_FILE, "".join(f"{lang}\n" for lang in langs))


def _train_model(plan, pool, files, lines, path):
    """Train a SentencePiece model, unless it is there.

    Args:
        files: ``{language: its files}``
        lines: ``{file: number of lines}``
    """
    if not plan.sample.exists():
        write_sample(files, lines, plan.sample, plan.temperature, plan.sample_lines, plan.seed)
    if not path.exists():
        print("sentencepiece: drawn the sample; training takes minutes, with no bar", flush=True)
        sizes = plan.vocab_size, plan.character_coverage
        try:
            pool.run(train_sentencepiece, plan.sample, path, *sizes)
        except OptionError:
            plan.sample.unlink()  # its content depends on the options
            raise
    if path != plan.model:
        plan.sample.unlink()  # the next language has another


def encode(plan, pool):
    """Turn text into the ids of the dictionary. Summary: ``{text file: number of chunks}``."""
    plan.ids.mkdir(exist_ok=True)
    numbers, jobs, job_bytes, models = {}, [], 0, []
    names = _text_files(plan)
    bounds_of_all = pool.map(
        binary.chunk_bounds, [(plan.clean / name,) for name in names], "measure", "file"
    )
    for name, bounds in zip(names, bounds_of_all):
        chunks = binary.chunk_files(plan.ids, name, len(bounds))
        numbers[name] = len(chunks)
        model = sentencepiece_file(plan.target, name.rpartition(".")[2])
        for (start, stop), chunk in zip(bounds, chunks):
            if job_bytes >= JOB_BYTES or models[-1:] != [model]:
                jobs.append([])
                models.append(model)
                job_bytes = 0
            jobs[-1].append((plan.clean / name, start, stop, chunk))
            job_bytes += stop - start
    dtype = binary.token_type(_dictionary_size(plan))
    jobs = [(job, model, plan.dictionary, dtype) for job, model in zip(jobs, models)]
    pool.map(binary.encode_chunks, jobs, "encode", "job")
    _write_summary(plan, "encode", numbers)


def binarise(plan, pool):
    """Join the chunks to the files that fairseq reads. Put the validation and test text beside
    them, to score translations against. Summary: counts of each text file."""
    cleaned, numbers = _summary(plan, "clean"), _summary(plan, "encode")
    jobs = []
    for name, number in numbers.items():
        split, pair, _ = name.split(".")
        shards = plan.shards(name, cleaned[pair][split]["kept"]["lines"])
        for shard in shards:
            shard.parent.mkdir(exist_ok=True)
        jobs.append((binary.chunk_files(plan.ids, name, number), shards))
        if split != "train":
            # with the ending .txt: without it, fairseq would read this file instead of the .bin
            text = (plan.clean / name).read_text(encoding="utf-8")
            write_whole(plan.target / f"{name}.txt", text)
    counts = pool.map(binary.binarise, jobs, "binarise", "file")
    _write_summary(plan, "binarise", dict(zip(numbers, counts)))


def report(plan, pool):
    """Describe the data in ``report.md``, ``report.json`` and pictures; warn of sentences that
    are too long for a model."""
    cleaned = _summary(plan, "clean")
    if not all(map(is_current, cleaned.values())):
        path = plan.summary("clean")
        raise OptionError(f"{path}: is of an earlier version; give --redo clean")
    long = too_long.find_too_long(plan, cleaned)
    too_long.warn(long)
    write_report(plan, cleaned, _summary(plan, "binarise"), long)


def _summary(plan, step):
    return json.loads(plan.summary(step).read_text(encoding="utf-8"))


def _write_summary(plan, step, content):
    write_whole(plan.summary(step), json.dumps(content) + "\n")


def _text_files(plan):
    """``["train.en-de.de", ...]`` of all text left after cleaning, the largest first."""
    names = [
        f"{split}.{pair}.{lang}"
        for pair, splits in _summary(plan, "clean").items()
        for split, counts in splits.items()
        for lang in pair.split("-")
        if counts["kept"]["lines"]
    ]
    return sorted(names, key=lambda name: (-(plan.clean / name).stat().st_size, name))


def _dictionary_size(plan):
    with open(plan.dictionary, encoding="utf-8") as handle:
        return sum(1 for _ in handle) + len(FAIRSEQ_SPECIALS)
