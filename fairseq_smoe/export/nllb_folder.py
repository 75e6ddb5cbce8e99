"""What is in a folder with an NLLB-MoE model of Hugging Face transformers."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

from fairseq_smoe.errors import OptionError

CONFIG, TOKENIZER, SPM = "config.json", "tokenizer.json", "sentencepiece.bpe.model"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or, in parts, their index
FIRST = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as fairseq has them
MODEL_TYPE = "nllb-moe"
# inverse of what transformers calls them
ACTIVATIONS = {
    **{name: name for name in ("relu", "gelu", "tanh", "linear")},
    "relu2": "relu_squared",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "silu": "swish",
    "swish": "swish",
}
# options of the configuration that this project's model has no other value of
EXPECTED = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": True,
}


def read_config(folder):
    """The configuration, with the defaults of transformers where the file leaves them out.

    Raises:
        OptionError: it is of another model, or has a value that has no counterpart here.
    """
    path = Path(folder) / CONFIG
    given = _read_json(path)
    if given.get("model_type") != MODEL_TYPE:
        raise OptionError(
            f"{path}: model_type {given.get('model_type')}; expected {MODEL_TYPE}, other models "
            "cannot be imported"
        )
    config = {**DEFAULTS, **{name: v for name, v in given.items() if v is not None}}
    for name, value in EXPECTED.items():
        if config[name] != value:
            raise OptionError(f"{path}: {name} {config[name]}; only {value} can be imported")
    if config["activation_function"] not in ACTIVATIONS:
        raise OptionError(
            f"{path}: activation_function {config['activation_function']}; expected one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    if config["second_expert_policy"] not in ("all", "sampling"):
        raise OptionError(
            f"{path}: second_expert_policy {config['second_expert_policy']}; only all and sampling "
            "can be imported"
        )
    return config


# what NllbMoeConfig has where the file is silent
DEFAULTS = {
    "vocab_size": 128112,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "relu",
    "d_model": 1024,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "scale_embedding": True,
    "router_bias": False,
    "num_experts": 128,
    "encoder_sparse_step": 4,
    "decoder_sparse_step": 4,
    "second_expert_policy": "all",
    "moe_token_dropout": 0.2,
    **EXPECTED,
}


def read_vocabulary(folder, size):
    """The words of the dictionary and the languages.

    Args:
        size: number of rows of the embedding.

    Returns:
        ``(words, languages)``: a word for every row, the tokens of languages as fairseq writes
        them; languages in the order of their ids.

    Raises:
        OptionError: the tokenizer does not fit the model.
    """
    path = Path(folder) / TOKENIZER
    content = _read_json(path)
    pieces = content["model"]["vocab"]
    if isinstance(pieces, list):  # of a unigram model, with scores
        pieces = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = {i: piece for piece, i in pieces.items()}
    special = re.compile(r"<.*>")
    languages = {}
    for token in content["added_tokens"]:
        ids[token["id"]] = token["content"]
        if not special.fullmatch(token["content"]):
            languages[token["id"]] = token["content"]
    if tuple(map(ids.get, range(len(FIRST)))) != FIRST:
        raise OptionError(f"{path}: its first tokens are not {' '.join(FIRST)}, as in fairseq")
    if max(ids) >= size:
        raise OptionError(
            f"{path}: has a token {ids[max(ids)]} with id {max(ids)}, and the model's embedding "
            f"{size} rows; give the tokenizer of this model"
        )
    if not languages:
        raise OptionError(
            f"{path}: has no tokens of languages among its added tokens; give the tokenizer of "
            "this model"
        )
    languages = dict(sorted(languages.items()))
    for language in languages.values():
        if "-" in language or not language.strip():
            raise OptionError(f"{path}: {language!r} cannot be a language's code here")
    words = [ids.get(i, f"madeupword{i:04d}") for i in range(size)]
    for i, language in languages.items():
        words[i] = f"__{language}__"
    return words, list(languages.values())


class Weights:
    """The tensors of a folder, which are read one at a time.

    Attributes:
        unread: names of those that have not been read.
    """

    def __init__(self, folder):
        """Open the files.

        Raises:
            OptionError: there are none, or one is missing or damaged.
        """
        self._folder, self._open, self._files = Path(folder), ExitStack(), {}
        self._file_of = self._find()
        self.unread = set(self._file_of)

    def _find(self):
        for name in WEIGHTS:
            index = self._folder / f"{name}.index.json"
            if index.is_file():
                return _read_json(index)["weight_map"]
            if (self._folder / name).is_file():
                return dict.fromkeys(self._names(name), name)
        raise OptionError(f"{self._folder}: has none of {', '.join(WEIGHTS)} and their indices")

    def _names(self, file):
        opened = self._file(file)
        return opened.keys()

    def _file(self, name):
        """An object with ``keys`` and the tensors of one file."""
        if name not in self._files:
            self._files[name] = self._open_file(self._folder / name)
        return self._files[name]

    def _open_file(self, path):
        from safetensors import SafetensorError, safe_open

        from fairseq_smoe.checkpoints import files

        if path.suffix != ".safetensors":
            return files.read(path)  # maps the tensors, executes nothing
        try:
            return self._open.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise OptionError(f"{path}: cannot be read ({error}); copy it again") from error

    def __contains__(self, name):
        return name in self._file_of

    def take(self, name):
        """One tensor.

        Raises:
            OptionError: there is no such tensor.
        """
        if name not in self._file_of:
            raise OptionError(f"{self._folder}: its weights have no {name}")
        self.unread.discard(name)
        file = self._file(self._file_of[name])
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def close(self):
        self._open.close()


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(
            f"{path}: no such file; give a folder as save_pretrained of transformers leaves it"
        ) from None
    except ValueError as error:
        raise OptionError(f"{path}: is damaged ({error}); copy it again") from error
