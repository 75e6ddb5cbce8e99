"""BLEU over vocabulary pieces of validation sentences, during training (--eval-bleu)."""

import torch
from fairseq.logging import metrics
from fairseq.sequence_generator import SequenceGenerator
from sacrebleu.metrics import BLEU

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.criterion import take_routing_stats
from fairseq_smoe.translation.language_tokens import count_words

ORDER = 4  # n-grams of BLEU
# columns of the statistics: matches and totals of each order, lengths of translation and reference
NUM_STATISTICS = 2 * ORDER + 2
STATISTICS = "bleu_statistics"
# maximum length, MAX_LEN_A * source + MAX_LEN_B: a model that has learned little does not end its
# translations by itself
MAX_LEN_A, MAX_LEN_B = 2, 20


def add_arguments(parser):
    parser.add_argument(
        "--eval-bleu",
        action="store_true",
        help="translate validation sentences, and log BLEU over pieces: bleu_en-de etc. for each "
        "direction, and bleu, the mean of all directions. To choose the best checkpoint by it, add "
        "--best-checkpoint-metric bleu --maximize-best-checkpoint-metric",
    )
    parser.add_argument(
        "--eval-bleu-beam", type=int, default=1, metavar="N", help="beam size of --eval-bleu"
    )
    parser.add_argument(
        "--eval-bleu-sentences",
        type=int,
        default=100,
        metavar="N",
        help="with --eval-bleu: translate the first N sentences of each direction; 0 for all",
    )


class ValidationBLEU:
    """Translates the sentences of validation batches, which mix directions.

    Every translation is forced to start with the token of its own target language, so a batch with
    several directions is translated at once. Each batch logs one tensor of sums, (directions,
    NUM_STATISTICS), which fairseq adds up over batches and processes.
    """

    def __init__(self, args, directions, dictionary, data_manager):
        """
        Args:
            args: options of the training.
            directions: in the order of the batches' ``direction``.
            dictionary: the vocabulary.
            data_manager: to look up the language tokens.

        Raises:
            OptionError: a wrong value, or an option that this cannot work with.
        """
        for option, least in (("eval_bleu_beam", 1), ("eval_bleu_sentences", 0)):
            value = getattr(args, option)
            if value < least:
                raise OptionError(f"--{option.replace('_', '-')} {value}: expected {least} or more")
        if getattr(args, "lang_tok_replacing_bos_eos", False):
            raise OptionError(
                "--eval-bleu with --lang-tok-replacing-bos-eos: not possible, because batches do "
                "not know their directions; drop one of them"
            )
        if getattr(args, "ddp_backend", None) == "fully_sharded":
            raise OptionError(
                "--eval-bleu with --ddp-backend fully_sharded: not possible, because no process "
                "has the whole model; drop --eval-bleu"
            )
        self.beam = args.eval_bleu_beam
        self.sentences = args.eval_bleu_sentences
        self.directions = directions
        self.dictionary = dictionary
        self.bleu = BLEU(tokenize="none", force=True)
        _, spec = args.langtoks["main"]
        tokens = [data_manager.get_decoder_langtok(d.split("-")[1], spec) for d in directions]
        self.prefix = torch.tensor(tokens).unsqueeze(1) if spec else None

    def statistics(self, sample, model):
        """(directions, NUM_STATISTICS) float64: sums over those sentences of a batch that are
        scored."""
        sums = torch.zeros(len(self.directions), NUM_STATISTICS, dtype=torch.float64)
        # a rank that has no batch left gets a training batch, to keep step with the others
        position_B = sample.get("position", torch.empty(0))
        limit = self.sentences or torch.inf
        chosen = (position_B < limit).nonzero().squeeze(1)
        if not len(chosen):
            return sums.to(sample["target"].device)
        direction_B = sample["direction"][chosen].cpu()
        texts = {d: ([], []) for d in direction_B.tolist()}  # translations and references
        translated = self._translate(sample["net_input"], chosen, direction_B, model)
        for d, hypotheses, target in zip(
            direction_B.tolist(), translated, sample["target"][chosen].cpu()
        ):
            texts[d][0].append(self._text(hypotheses[0]["tokens"].cpu(), d, "unk"))
            # an unknown piece of the reference must not match an unknown piece of the translation
            texts[d][1].append(self._text(target, d, "unknown"))
        for d, (translations, references) in texts.items():
            score = self.bleu.corpus_score(translations, [references])
            row = [*score.counts, *score.totals, score.sys_len, score.ref_len]
            sums[d] = torch.tensor(row, dtype=torch.float64)
        return sums.to(sample["target"].device)

    def _translate(self, net_input, chosen, direction_B, model):
        lengths = net_input["src_lengths"][chosen]
        # drop columns that are padding in all chosen sentences
        width = int(lengths.max())
        tokens = net_input["src_tokens"][chosen]
        tokens = tokens[:, -width:] if self._left_padded(tokens) else tokens[:, :width]
        generator = SequenceGenerator(
            [model],
            self.dictionary,
            beam_size=self.beam,
            max_len_a=MAX_LEN_A,
            max_len_b=MAX_LEN_B,
        )
        prefix = None
        if self.prefix is not None:
            prefix = self.prefix[direction_B].to(tokens)
            count_words(generator)
        sample = {"net_input": {"src_tokens": tokens, "src_lengths": lengths}}
        hypotheses = generator.generate([model], sample, prefix_tokens=prefix)
        take_routing_stats(model)  # drop the statistics of translations
        return hypotheses

    def _left_padded(self, tokens):
        return bool(tokens[:, 0].eq(self.dictionary.pad()).any())

    def _text(self, tokens, direction, unknown):
        """Piece ids joined by spaces, which sacreBLEU splits at spaces only."""
        special = {self.dictionary.pad(), self.dictionary.eos()}
        if self.prefix is not None:
            special.add(int(self.prefix[direction]))
        unk = self.dictionary.unk()
        return " ".join(
            unknown if token == unk else str(token)
            for token in tokens.tolist()
            if token not in special
        )

    def log(self, logging_outputs):
        """Log the BLEU of each direction that has been translated, and their mean."""
        batches = [log[STATISTICS] for log in logging_outputs if STATISTICS in log]
        if not batches:
            return
        sums = sum(batches).cpu()
        metrics.log_scalar(f"_{STATISTICS}", sums)  # its meter adds up the batches
        for d, direction in enumerate(self.directions):
            if sums[d, -1] > 0:
                metrics.log_derived(f"bleu_{direction}", lambda meters, d=d: _score(meters, d))
        if sums[:, -1].any():
            metrics.log_derived("bleu", _mean_score)


def _score(meters, direction):
    return round(_bleu(meters[f"_{STATISTICS}"].sum[direction]), 2)


def _mean_score(meters):
    scores = [_bleu(row) for row in meters[f"_{STATISTICS}"].sum if row[-1] > 0]
    return round(sum(scores) / len(scores), 2)


def _bleu(row):
    numbers = [int(number) for number in row]
    return BLEU.compute_bleu(
        correct=numbers[:ORDER],
        total=numbers[ORDER : 2 * ORDER],
        sys_len=numbers[-2],
        ref_len=numbers[-1],
        smooth_method="exp",
    ).score
