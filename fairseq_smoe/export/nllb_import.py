"""From an NLLB-MoE model of Hugging Face transformers to a checkpoint and a data folder."""

import os
import re
import shutil
import warnings
from itertools import permutations
from pathlib import Path

import torch
from fairseq import options as fairseq_options
from fairseq import tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_smoe.checkpoints import files
from fairseq_smoe.errors import OptionError
from fairseq_smoe.export import nllb_folder
from fairseq_smoe.files import require_new_folder, whole_folder, write_whole
from fairseq_smoe.translation.task_files import LANGS_FILE, SPM_FILE

SIDES = ("encoder", "decoder")
CHECKPOINT = "checkpoint_best.pt"  # the name by which a folder's checkpoint is found
DICTIONARY = "dict.txt"
# parts of a layer, here -> in transformers
RENAMED = (
    (r"encoder_attn(_layer_norm)?\.", r"cross_attention\1."),
    (r"final_layer_norm\.", r"ff_layer_norm."),
    (r"expert_block\.norms\.0\.", r"ff_layer_norm."),
    (r"expert_block\.gates\.0\.logit_bias", r"ffn.router.classifier.bias"),
    (r"expert_block\.gates\.0\.", r"ffn.router.classifier."),
    (r"(layers\.\d+)\.(fc[12]\.)", r"\1.ffn.\2"),
)
STACKED = re.compile(r"expert_block\.experts\.(fc[12])_(weight|bias)")
EMBEDDING = ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")
# what transformers may have saved besides: copies of the embedding, and positions that are computed
COPIES = re.compile(r"lm_head\.weight|model\.(shared|\w+coder\.embed_tokens)\.weight|.*embed_pos.*")


def import_nllb(folder, target, directions=None):
    """Write a folder with a checkpoint, dictionaries, languages and the SentencePiece model.

    Args:
        folder: as ``save_pretrained`` leaves model and tokenizer, with the SentencePiece model.
        target: folder to make. It is complete or absent.
        directions: to record as those of the training, ``"deu_Latn-eng_Latn"``; None for all.

    Returns:
        the model.

    Raises:
        OptionError: a file is missing or damaged, or the model has no counterpart here.
    """
    folder, target = Path(folder), Path(target)
    require_new_folder(target)
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such folder; give one with an NLLB-MoE model")
    config = nllb_folder.read_config(folder)
    words, languages = nllb_folder.read_vocabulary(folder, config["vocab_size"])
    directions = _check_directions(directions, languages)
    if not (folder / nllb_folder.SPM).is_file():
        raise OptionError(
            f"{folder}: has no {nllb_folder.SPM}, the SentencePiece model; copy it there, too"
        )
    with whole_folder(target) as part:
        _write_data(part, words, languages)
        shutil.copyfile(folder / nllb_folder.SPM, part / SPM_FILE)
        cfg = _training(part, config, directions)
        task = tasks.setup_task(cfg.task)
        model = task.build_model(cfg.model, from_checkpoint=True).eval()
        weights = nllb_folder.Weights(folder)
        try:
            _fill(model, weights)
        finally:
            weights.close()
        cfg.task.data = str(target.resolve())
        files.write(_state(cfg, task, model), part / CHECKPOINT)
    return model


def _check_directions(directions, languages):
    for direction in directions or ():
        if direction.count("-") != 1 or not set(direction.split("-")) <= set(languages):
            raise OptionError(
                f"--directions {direction}: expected two of the model's languages joined by a "
                f"hyphen, e.g. {languages[0]}-{languages[-1]}"
            )
    return directions or ["-".join(pair) for pair in permutations(languages, 2)]


def _write_data(folder, words, languages):
    dictionary = Dictionary()
    for i, word in enumerate(words):
        if dictionary.add_symbol(word, 1) != i:
            raise OptionError(f"{nllb_folder.TOKENIZER}: has {word!r} twice; give another")
    dictionary.save(str(folder / DICTIONARY))
    for language in languages:
        # hundreds of languages have the same large dictionary
        path = folder / f"dict.{language}.txt"
        try:
            os.link(folder / DICTIONARY, path)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / DICTIONARY, path)
    write_whole(folder / LANGS_FILE, "".join(f"{language}\n" for language in languages))


def _training(folder, config, directions):
    """The configuration that a training of this model would have."""
    words = [
        str(folder),
        *("--task", "smoe_translation", "--arch", "smoe_transformer"),
        *("--criterion", "moe_label_smoothed_cross_entropy", "--optimizer", "adam"),
        *("--lr-scheduler", "inverse_sqrt", "--lr", "1e-4"),
        *("--lang-pairs", ",".join(directions)),
        # as NLLB was trained: each side begins with the token of its own language
        *("--encoder-langtok", "src"),
    ]
    for name, value in model_options(config).items():
        if value is not False and value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    parser = fairseq_options.get_training_parser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra's, about what fairseq uses of it
        return convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser, words))


def model_options(config):
    """``{name: value}`` of the options of ``smoe_transformer``.

    Args:
        config: what :func:`~fairseq_smoe.export.nllb_folder.read_config` returns.
    """
    periods = {}
    for side in SIDES:
        step = config[f"{side}_sparse_step"]
        periods[f"{side}_moe_freq"] = step if 0 < step <= config[f"{side}_layers"] else 0
    experts = {
        "moe_expert_count": config["num_experts"],
        "moe_gate_bias": config["router_bias"],
        "moe_eom": config["moe_token_dropout"],
        "moe_second_expert_policy": config["second_expert_policy"],
    }
    sides = {
        f"{side}_{here}": config[f"{side}_{there}"]
        for side in SIDES
        for here, there in (
            ("layers", "layers"),
            ("ffn_embed_dim", "ffn_dim"),
            ("attention_heads", "attention_heads"),
        )
    }
    return {
        "encoder_embed_dim": config["d_model"],
        **sides,
        "activation_fn": nllb_folder.ACTIVATIONS[config["activation_function"]],
        **{name: config[name] for name in ("dropout", "attention_dropout", "activation_dropout")},
        "no_scale_embedding": not config["scale_embedding"],
        "max_source_positions": config["max_position_embeddings"],
        "max_target_positions": config["max_position_embeddings"],
        **(periods | experts if any(periods.values()) else {"moe_freq": 0}),
    }


@torch.no_grad()
def _fill(model, weights):
    for name, parameter in model.named_parameters():
        tensor = _tensor(name, weights)
        if tensor.shape != parameter.shape:
            raise OptionError(
                f"{name}: has the shape {tuple(tensor.shape)} in the weights, and by "
                f"{nllb_folder.CONFIG} {tuple(parameter.shape)}; give the one of this model"
            )
        parameter.copy_(tensor)
    left = sorted(name for name in weights.unread if not COPIES.fullmatch(name))
    if left:
        raise OptionError(f"{left[0]}: this tensor has no place in a model of this project")


def _tensor(name, weights):
    """The value of a parameter."""
    if name.rpartition(".")[0] in EMBEDDING:
        there = "model.shared.weight"  # some versions save one of its copies only
        return weights.take(there if there in weights else "model.encoder.embed_tokens.weight")
    stacked = STACKED.search(name)
    if not stacked:
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        return weights.take(f"model.{name}")
    layer, kind = name[: stacked.start()], f"{stacked[1]}.{stacked[2]}"
    own, number = [], 0
    while (expert := f"model.{layer}ffn.experts.expert_{number}.{kind}") in weights:
        tensor = weights.take(expert)
        own.append(tensor.t() if stacked[2] == "weight" else tensor)
        number += 1
    if not own:
        raise OptionError(f"{expert}: is missing in the weights; is the layer dense?")
    return torch.stack(own)


def _state(cfg, task, model):
    """A checkpoint as fairseq writes it, before the first update."""
    history = {
        "criterion_name": "MoELabelSmoothedCrossEntropyCriterion",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    return {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "criterion": None,
        "optimizer_history": [history],
        "task_state": task.state_dict(),
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True}},
    }
