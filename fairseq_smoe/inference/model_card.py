"""The model card of a packed or exported model: Markdown with the front matter of the Hugging Face
hub."""

import json
import re
import shlex

from fairseq_smoe.accounting.flops import count_parameters, flops_per_token
from fairseq_smoe.benchmarks.runs import RUN_FILE
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.scoring import SCORES_FILE

USE_PACKED = """\
    from fairseq_smoe import Translator

    translator = Translator.load("PATH OF THIS FOLDER")
    print(translator.translate("...", "{source}", "{target}").text)

or `python -m fairseq_smoe translate PATH --source ... --target ...`.
"""
DENSE = "none, dense"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def check_license(license_id):
    """Check a licence before the model is read.

    Raises:
        OptionError: it is no name of the hub's form.
    """
    if not LICENSE.fullmatch(license_id):
        raise OptionError(f"--license {license_id}: expected a name such as mit or cc-by-4.0")


def model_card(described, model, run, name, license_id, use=USE_PACKED, library="fairseq-smoe"):
    """The text of the card.

    Args:
        described: :class:`~fairseq_smoe.inference.sources.Described`
        model: what was built of it.
        run: folder with ``evaluation/`` and ``run.json``; None to look beside the checkpoint.
        name: title.
        license_id: as the hub names licences.
        use: how to translate with it; ``{source}`` and ``{target}`` become the languages of the
            first direction.
        library: that reads the folder.
    """
    directions = described.directions
    flops = flops_per_token(model, described.options)
    beside = [described.path.parent, described.path.parent.parent]
    runs = beside if run is None else [run]
    languages = "".join(f"- {language}\n" for language in described.languages)
    experts = describe_experts(described.options)
    facts = [
        f"| parameters | {count_parameters(model):,} |",
        f"| forward FLOPs a token | {flops / 1e6:.1f} million, under uniform gates |",
        f"| experts | {experts} |",
        f"| updates | {described.num_updates:,} |",
        f"| directions | {', '.join(directions)} |",
    ]
    command = next(filter(None, map(_training_command, runs)), None)
    trained = "" if command is None else f"\n## Training\n\n    {command}\n"
    scores = next(filter(None, map(_scores, runs)), "")
    source, target = directions[0].split("-")
    kind = tag = ""
    if experts != DENSE:
        kind = " with experts in strata (Xu et al. 2023, arXiv 2305.02176)"
        tag = "- mixture-of-experts\n"
    use = use.replace("{source}", source).replace("{target}", target)
    return f"""---
license: {license_id}
language:
{languages}tags:
- translation
{tag}- fairseq-smoe
library_name: {library}
pipeline_tag: translation
---

# {name}

A multilingual translation model{kind},
trained with fairseq-smoe.

| | |
|---|---|
{chr(10).join(facts)}

## Use

{use}{scores}{trained}"""


def describe_experts(options):
    """``strata 4-4 in every 2nd layer``"""
    from fairseq_smoe.moe.strata import format_strata
    from fairseq_smoe.translation.options import expert_layer_period, resolve_strata

    periods = {side: expert_layer_period(options, side) for side in ("encoder", "decoder")}
    if not any(periods.values()):
        return DENSE
    where = ", ".join(f"{side}: every {n} layers" for side, n in periods.items() if n)
    return f"strata {format_strata(resolve_strata(options))} ({where})"


def _training_command(run):
    path = run / RUN_FILE
    if not path.exists():
        return None
    command = json.loads(path.read_text()).get("command")
    return shlex.join(command) if isinstance(command, list) else command


def _scores(run):
    path = run / "evaluation" / "test" / SCORES_FILE
    if not path.exists():
        return None
    directions = json.loads(path.read_text())["directions"]
    lines = [
        f"| {name} | {_score(facts, 'bleu')} | {_score(facts, 'chrf++')} |"
        for name, facts in directions.items()
    ]
    table = "\n".join(["| direction | BLEU | chrF++ |", "|---|---:|---:|", *lines])
    return f"\n## Scores\n\nsacreBLEU, on the test set of the training data.\n\n{table}\n"


def _score(facts, metric):
    return f"{facts[metric]:.1f}" if metric in facts else ""
