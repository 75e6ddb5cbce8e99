"""A folder that ``from_pretrained`` of Hugging Face transformers reads."""

import json
import shutil
from pathlib import Path

from fairseq_smoe.export import travelling
from fairseq_smoe.export.transformers_model import configuration, parameters
from fairseq_smoe.files import whole_file, write_whole
from fairseq_smoe.translation.task_files import SPM_FILE

TRAVELLING = Path(travelling.__file__).parent
BEAM, LENGTH_PENALTY, MOST_WORDS = 5, 1.0, 200  # the defaults of fairseq-generate
USE = """\
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        "PATH OF THIS FOLDER", trust_remote_code=True, src_lang="{source}", tgt_lang="{target}"
    )
    model = AutoModelForSeq2SeqLM.from_pretrained("PATH OF THIS FOLDER"TRUSTED)
    batch = tokenizer(["..."], padding=True, return_tensors="pt")
    found = model.generate(**batch, logits_processor=[tokenizer.rules()])
    print(tokenizer.batch_decode(found, skip_special_tokens=True))

`trust_remote_code` lets transformers run FILES of this folder.
A batch has one target language; set `tokenizer.src_lang` and `tokenizer.tgt_lang` to change it.
"""


def write(folder, model, options, dictionary, start, spm):
    """Write all files but the README.

    Args:
        folder: to write into.
        model, options, dictionary: see
            :func:`~fairseq_smoe.export.transformers_model.configuration`.
        start: :class:`~fairseq_smoe.export.language_start.LanguageStart`
        spm: path of the SentencePiece model.

    Raises:
        OptionError: the classes of transformers cannot compute what this model does.
    """
    from safetensors.torch import save

    config = configuration(model, options, dictionary)
    with whole_file(folder / "model.safetensors") as file:
        file.write(save(parameters(model), metadata={"format": "pt"}))
    _write_json(folder / "config.json", config)
    limit = model.decoder.max_positions()
    _write_json(folder / "generation_config.json", generation(dictionary, start, limit))
    _write_json(folder / "tokenizer_config.json", _tokenizer(start, model.encoder.max_positions()))
    _write_json(folder / "vocab.json", {word: i for i, word in enumerate(dictionary.symbols)})
    shutil.copyfile(spm, folder / SPM_FILE)
    shutil.copyfile(TRAVELLING / "tokenization_smoe.py", folder / "tokenization_smoe.py")
    if "auto_map" in config:
        shutil.copyfile(TRAVELLING / "modeling_smoe.py", folder / "modeling_smoe.py")


def use(has_experts):
    """The text of the README about translating."""
    files = ["`tokenization_smoe.py`", *(["`modeling_smoe.py`"] if has_experts else [])]
    return USE.replace("TRUSTED", ", trust_remote_code=True" if has_experts else "").replace(
        "FILES", " and ".join(files)
    )


def generation(dictionary, start, most_tokens):
    """The contents of ``generation_config.json``: a search like that of fairseq-generate.

    Args:
        most_tokens: that the decoder takes.
    """
    # the language's token, words, and the end
    first = int(start.target)
    return {
        "num_beams": BEAM,
        "length_penalty": LENGTH_PENALTY,
        # fairseq stops as soon as there are as many hypotheses as beams
        "early_stopping": True,
        "max_new_tokens": min(first + MOST_WORDS + 1, most_tokens),
        "min_new_tokens": first + 1,
        "bos_token_id": dictionary.bos(),
        "pad_token_id": dictionary.pad(),
        "eos_token_id": dictionary.eos(),
        "decoder_start_token_id": dictionary.eos(),
    }


def _tokenizer(start, most_tokens):
    return {
        "tokenizer_class": "SMoETokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_smoe.SMoETokenizer", None]},
        "model_max_length": most_tokens,
        "padding_side": "right",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(start.tokens.values()),
        "language_tokens": start.tokens,
        "source_token": start.source,
        "target_token": start.target,
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path, value):
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
