"""Text on which a conversion looks at what the layers of the model get."""

from contextlib import contextmanager
from copy import copy

import numpy as np
from tqdm import tqdm

from fairseq_smoe.analysis.passes import batches, direction_datasets, load_model, run_pass, seed_of


class Text:
    """A model with the text that it reads.

    Attributes:
        model: of the checkpoint, in evaluation mode, on the GPU if there is one.
    """

    def __init__(self, checkpoint, args):
        """Load model and text.

        Args:
            checkpoint: its path.
            args: the options of ``commands/convert/text_options.py``.

        Raises:
            OptionError: there is no such text.
        """
        self.model, task, _ = load_model(checkpoint, args.data)
        self._datasets = direction_datasets(task, args.subset)
        self._max_tokens = args.max_tokens
        self._plans = {
            direction: batches(
                dataset,
                task.max_positions(),
                args.max_tokens,
                args.max_sentences,
                seed_of(direction),
            )
            for direction, dataset in self._datasets.items()
        }

    @property
    def num_sentences(self):
        return sum(len(batch) for plan in self._plans.values() for batch in plan)

    def dealt(self, number):
        """The text in parts of as many sentences, drawn at random from all directions. Which
        sentences are in a part does not depend on the size of the batches.

        Returns:
            list of up to ``number`` texts, none of them empty.
        """
        sentences = [
            (direction, index)
            for direction, plan in self._plans.items()
            for batch in plan
            for index in batch
        ]
        order, texts = np.random.default_rng(1).permutation(len(sentences)), []
        for part in range(min(number, len(sentences))):
            plan = {}
            for place in sorted(order[part::number]):  # from short to long, as they were
                direction, index = sentences[place]
                plan.setdefault(direction, []).append(index)
            texts.append(copy(self))
            texts[-1]._plans = {
                direction: list(
                    self._datasets[direction].batch_by_size(
                        np.array(indices, dtype=np.int64), max_tokens=self._max_tokens
                    )
                )
                for direction, indices in plan.items()
            }
        return texts

    def run(self, what):
        """Send all sentences through the model, with a progress bar; hooks on the model see them.

        Args:
            what: is being done, for the bar.
        """
        with tqdm(total=self.num_sentences, unit="sentence", desc=what, disable=None) as progress:
            for direction, plan in self._plans.items():
                run_pass(self.model, self._datasets[direction], plan, progress)


@contextmanager
def token_inputs(model, modules, receive):
    """While this lasts, ``receive(name, tokens_TD)`` is called whenever one of some modules runs,
    with the tokens that go into it. Padding is left out.

    Args:
        model: the whole model, whose embeddings tell padding apart.
        modules: ``{name: module}``; the first argument of each is (S, B, D), as in fairseq's
            layers, or (B, S, D) for an expert block.
        receive: gets tokens in the order of the sentences, sentence by sentence.
    """
    real = {}  # whether the tokens embedded last, (B, S), are none of padding

    def remember(embedding, inputs, _):
        real["BS"] = inputs[0] != embedding.padding_idx

    def hook(name, batch_first):
        def give(_, inputs, __):
            tokens = inputs[0] if batch_first else inputs[0].transpose(0, 1)
            receive(name, tokens[real["BS"]])

        return give

    embeddings = {model.encoder.embed_tokens, model.decoder.embed_tokens}
    handles = [embedding.register_forward_hook(remember) for embedding in embeddings]
    for name, module in modules.items():
        batch_first = name.endswith("expert_block")
        handles.append(module.register_forward_hook(hook(name, batch_first)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
