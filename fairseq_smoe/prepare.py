"""Parallel text to a folder that ``fairseq-train --task smoe_translation`` reads.

Text files are named ``PREFIX.A-B.A`` and ``PREFIX.A-B.B``, one sentence a line.
"""

import json
import logging
from pathlib import Path

import sentencepiece as spm
from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.task_files import LANGS_FILE

DEFAULT_SPLITS = ("train=train", "valid=valid", "test=test")


def add_arguments(parser):
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="folder of the text files"
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--pairs", required=True, help="language pairs as the files name them: eng-nso,eng-tgl"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        default=DEFAULT_SPLITS,
        metavar="NAME=PREFIX",
        help="which files make which split: train, valid, test, test1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="joint SentencePiece vocabulary (%(default)s)"
    )
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the SentencePiece sample")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")


def run(args):
    """Train SentencePiece, encode, binarise. Steps whose output is complete are skipped."""
    source, target = Path(args.source), Path(args.to)
    pairs, splits = parse_pairs(args.pairs), parse_splits(args.splits)
    for prefix in splits.values():
        for pair in pairs:
            check_parallel(source, prefix, pair)
    target.mkdir(parents=True, exist_ok=True)
    check_same_settings(target, args)
    model = train_sentencepiece(source, target, pairs, splits["train"], args)
    dictionary = write_dictionary(model, target)
    write_languages(pairs, target)
    jobs = [(name, prefix, pair) for name, prefix in splits.items() for pair in pairs]
    for name, prefix, pair in tqdm(jobs, desc="encode", unit="file pair"):
        encode(model, source, target / "pieces", name, prefix, pair)
    for pair in tqdm(pairs, desc="binarise", unit="language pair"):
        binarise(target, dictionary, pair, list(splits), args.workers)


def parse_pairs(text):
    """``"en-de,en-nl"`` -> ``["en-de", "en-nl"]``"""
    pairs = text.split(",")
    for pair in pairs:
        if len(pair.split("-")) != 2 or not all(pair.split("-")):
            raise OptionError(
                f"--pairs {pair}: expected two languages joined by one hyphen, e.g. en-de"
            )
    return pairs


def parse_splits(words):
    """``["train=train", "valid=dev"]`` -> ``{"train": "train", "valid": "dev"}``"""
    splits = {}
    for word in words:
        name, _, prefix = word.partition("=")
        if not prefix or not (name in ("train", "valid") or name.startswith("test")):
            raise OptionError(
                f"--splits {word}: expected NAME=PREFIX with NAME train, valid, test, test1, ..."
            )
        splits[name] = prefix
    tests = [name for name in splits if name.startswith("test")]
    if tests != [f"test{i or ''}" for i in range(len(tests))]:
        raise OptionError(f"--splits {' '.join(tests)}: name test sets test, test1, test2, ...")
    for name in ("train", "valid"):
        if name not in splits:
            raise OptionError(f"--splits: {name} is missing; add {name}=PREFIX")
    return splits


def check_same_settings(target, args):
    """Refuse to mix the output of two different calls in one folder.

    Raises:
        OptionError: names the first option that differs from the call that began the folder.
    """
    settings = {
        "--from": str(Path(args.source).resolve()),
        "--pairs": args.pairs,
        "--splits": " ".join(args.splits),
        "--vocab-size": args.vocab_size,
        "--character-coverage": args.character_coverage,
        "--seed": args.seed,
    }
    path = target / "settings.json"
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=1) + "\n")
    for option, before in json.loads(path.read_text(encoding="utf-8")).items():
        if settings[option] != before:
            raise OptionError(
                f"{option} {settings[option]}: {target} was begun with {option} {before}; "
                "delete it or choose another --to"
            )


def check_parallel(folder, prefix, pair):
    """Both files exist and have the same number of lines, else an OptionError naming them."""
    counts = {}
    for lang in pair.split("-"):
        path = folder / f"{prefix}.{pair}.{lang}"
        if not path.exists():
            raise OptionError(f"{path}: no such file; --pairs and --splits ask for it")
        with open(path, "rb") as handle:
            counts[path] = sum(1 for _ in handle)
    (first, m), (second, n) = counts.items()
    if m != n:
        raise OptionError(f"{first} has {m} lines, {second} has {n}: they must be parallel")


def train_sentencepiece(source, target, pairs, prefix, args):
    path = target / "spm.model"
    if not path.exists():
        spm.set_random_generator_seed(args.seed)
        files = [str(source / f"{prefix}.{p}.{lang}") for p in pairs for lang in p.split("-")]
        try:
            spm.SentencePieceTrainer.train(
                input=files,
                model_prefix=str(target / "spm.part"),
                vocab_size=args.vocab_size,
                character_coverage=args.character_coverage,
                input_sentence_size=2_000_000,
                shuffle_input_sentence=True,
                num_threads=args.workers,
                minloglevel=1,
            )
        except RuntimeError as error:  # such as a vocabulary too large for the text
            (target / "settings.json").unlink()  # nothing is made yet: another size may follow
            raise OptionError(f"--vocab-size {args.vocab_size}: SentencePiece says: {error}")
        (target / "spm.part.vocab").unlink()
        (target / "spm.part.model").rename(path)
    return spm.SentencePieceProcessor(model_file=str(path))


def write_dictionary(model, target):
    """fairseq's dictionary of the same pieces; it brings its own special symbols."""
    pieces = [
        model.id_to_piece(i)
        for i in range(model.get_piece_size())
        if not (model.is_control(i) or model.is_unknown(i))
    ]
    path = target / "dict.txt"
    write_whole(path, "".join(f"{piece} 1\n" for piece in pieces))
    return path


def write_languages(pairs, target):
    langs = sorted({lang for pair in pairs for lang in pair.split("-")})
    write_whole(target / LANGS_FILE, "\n".join(langs) + "\n")


def write_whole(path, text):
    """Write a file that exists complete or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def encode(model, source, folder, name, prefix, pair):
    folder.mkdir(exist_ok=True)
    for lang in pair.split("-"):
        path = folder / f"{name}.{pair}.{lang}"
        if path.exists():
            continue
        part = path.with_name(path.name + ".part")
        with open(source / f"{prefix}.{pair}.{lang}", encoding="utf-8", newline="\n") as text:
            # a lone carriage return inside a sentence ends no line
            lines = [line.rstrip("\r\n").replace("\r", " ") for line in text]
        with open(part, "w", encoding="utf-8") as out:
            for pieces in model.encode(lines, out_type=str):
                out.write(" ".join(pieces) + "\n")
        part.rename(path)


def binarise(target, dictionary, pair, splits, workers):
    """What ``fairseq-preprocess`` does, without starting Python anew for every pair."""
    for name in ("fairseq", "fairseq_cli"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from fairseq import options
    from fairseq_cli import preprocess

    done = target / f".{pair}.done"
    if done.exists():
        return
    first, second = pair.split("-")
    command = ["--source-lang", first, "--target-lang", second]
    command += ["--srcdict", str(dictionary), "--tgtdict", str(dictionary)]
    command += ["--destdir", str(target), "--workers", str(workers)]
    tests = [name for name in splits if name.startswith("test")]
    for option, names in (("train", ["train"]), ("valid", ["valid"]), ("test", tests)):
        prefixes = ",".join(str(target / "pieces" / f"{name}.{pair}") for name in names)
        command += [f"--{option}pref", prefixes]
    preprocess.main(options.get_preprocessing_parser().parse_args(command))
    done.touch()
