"""Evaluation folders as ``evaluate`` leaves them, of made text, for the tests of scores and
tables."""

import json
import random

_WORDS = (
    "the a red blue old new house river tree child woman man sees finds takes gives brings to from "
    "under over with without and but, because. slowly often never today."
).split()


def sentences(number, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(5, 12))) for _ in range(number)]


TEXT = sentences(80, seed=1)


def worse(lines, share, seed=1):
    """Lines of which that share of the words is replaced."""
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(_WORDS) if rng.random() < share else word for word in line.split())
        for line in lines
    ]


def to_pieces(line):
    """Every word one piece, and a last letter that is one of its own."""
    return " ".join(
        f"▁{word[:-1]} {word[-1]}" if len(word) > 3 else f"▁{word}" for word in line.split(" ")
    )


def to_text(pieces):
    return pieces.replace(" ", "").replace("▁", " ").strip()


def write_evaluation(
    run, translations, run_facts=None, as_pieces=False, subset="test", num_updates=70
):
    """Make RUN/evaluation/SUBSET, without scores.json.

    Args:
        translations: ``{direction: (hypotheses, references)}``, lists of text, or of pieces.
        run_facts: content of run.json; None for none.

    Returns:
        the folder.
    """
    folder = run / "evaluation" / subset
    folder.mkdir(parents=True)
    if run_facts is not None:
        (run / "run.json").write_text(json.dumps(run_facts))
    for direction, both in translations.items():
        for side, lines in zip(("hyp", "ref"), both):
            pieces = lines if as_pieces else list(map(to_pieces, lines))
            text = list(map(to_text, lines)) if as_pieces else lines
            for suffix, content in (("pieces", pieces), ("txt", text)):
                path = folder / f"{direction}.{side}.{suffix}"
                path.write_text("".join(f"{line}\n" for line in content), newline="\n")
        facts = {
            "direction": direction,
            "sentences": len(both[0]),
            "seconds": 1.0,
            "checkpoint": {"file": "checkpoint_best.pt", "size": 1, "num_updates": num_updates},
            "settings": {"beam": 5},
            "requested_capacity": {"encoder": 1.5, "decoder": 1.25, "layers": {}},
        }
        (folder / f"{direction}.json").write_text(json.dumps(facts))
    return folder


def write_flores200_model(folder):
    """A small SentencePiece model to stand where that of Flores-200 does."""
    import sentencepiece

    (folder / "text").write_text("\n".join(sentences(300, seed=2)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "flores"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "flores.model"
