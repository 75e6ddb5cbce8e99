"""Tokens that go into each feed-forward network, drawn at random from a text and kept in files.

Letters in names: T tokens, D model dim.
"""

import json
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from fairseq_smoe.analysis.passes import seed_of
from fairseq_smoe.conversion.text import token_inputs
from fairseq_smoe.files import write_whole

DONE = "tokens.json"


class Sample:
    """A file with tokens drawn from all that are offered, each with the same probability.

    Args:
        path: the file.
        most: how many tokens to keep.
        seed: of the draw.

    Attributes:
        offered: number of tokens so far.
    """

    def __init__(self, path, most, seed):
        self._path, self._most = path, most
        self._random = np.random.default_rng(seed)
        self.offered = 0

    def offer(self, tokens_TD):
        """Take some of these tokens (reservoir sampling: Vitter 1985, algorithm R)."""
        tokens_TD = tokens_TD.float().cpu().numpy()
        number_T = self.offered + np.arange(len(tokens_TD))
        place_T = np.where(number_T < self._most, number_T, self._random.integers(0, number_T + 1))
        place = {p: t for t, p in enumerate(place_T.tolist()) if p < self._most}  # the last wins
        self.offered += len(tokens_TD)
        if not place:
            return
        mode = "r+" if self._path.exists() else "w+"
        # mapped for this call only, so that the file takes none of the process's memory
        shape = self._most, tokens_TD.shape[1]
        file = np.memmap(self._path, np.float32, mode, shape=shape)
        file[list(place)] = tokens_TD[list(place.values())]


def draw(text, ffns, folder, most, seed):
    """Read a text once, and write a file of tokens for each network; see :func:`load`.

    Args:
        text: :class:`~fairseq_smoe.conversion.text.Text`
        ffns: list of :class:`~fairseq_smoe.conversion.moefy.ffns.FFN`
        folder: for the files.
        most: tokens of each network.
        seed: of the draw.
    """
    files = [_file(folder, i) for i in range(len(ffns))]
    for file in files:
        file.unlink(missing_ok=True)
    samples = {ffn: Sample(file, most, [seed, seed_of(ffn.name)]) for ffn, file in zip(ffns, files)}
    with _offering(text.model, samples):
        text.run("reading text")
    offered = [sample.offered for sample in samples.values()]
    dims = {ffn.module: text.model.get_submodule(ffn.module) for ffn in ffns}
    facts = {
        "offered": offered,
        "dims": [_width(dims[ffn.module]) for ffn in ffns],
        "most": most,
    }
    write_whole(folder / DONE, json.dumps(facts))


def load(folder, i):
    """The tokens (T, D) of network ``i``, in a random order; and how many there were."""
    facts = json.loads((folder / DONE).read_text())
    offered, dim = facts["offered"][i], facts["dims"][i]
    kept = min(offered, facts["most"])
    if not kept:
        return torch.empty(0, dim), 0
    shape = facts["most"], dim
    tokens = np.memmap(_file(folder, i), np.float32, "r", shape=shape)[:kept]
    order = np.random.default_rng(i).permutation(kept)
    return torch.from_numpy(tokens[order]), offered


def drop(folder, i):
    """Remove the tokens of network ``i``."""
    _file(folder, i).unlink(missing_ok=True)


def is_drawn(folder):
    """Whether :func:`draw` has come to its end."""
    return (folder / DONE).exists()


def _file(folder, i):
    return folder / f"tokens-{i}.f32"


def _width(module):
    return module.embed_dim if hasattr(module, "embed_dim") else module.in_features


@contextmanager
def _offering(model, samples):
    """While this lasts, the samples are offered what goes into their networks."""
    dense = {ffn.module: sample for ffn, sample in samples.items() if ffn.expert is None}
    blocks = {}
    for ffn, sample in samples.items():
        if ffn.expert is not None:
            blocks.setdefault(ffn.module, {})[ffn.expert] = sample

    def rows_of(own):
        def offer(_, inputs):
            rows_ND, runs, _, experts = inputs
            sizes = runs.rows_per_expert
            for e, rows in zip(experts, rows_ND[: sum(sizes)].split(sizes)):
                if len(rows):
                    own[e].offer(rows)

        return offer

    with ExitStack() as stack:
        modules = {name: model.get_submodule(name) for name in dense}
        stack.enter_context(
            token_inputs(model, modules, lambda name, tokens: dense[name].offer(tokens))
        )
        for name, own in blocks.items():
            handle = model.get_submodule(name).register_forward_pre_hook(rows_of(own))
            stack.callback(handle.remove)
        yield
