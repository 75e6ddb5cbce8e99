"""Language tokens at translation: the task adds them, so users do not count or read them."""

import torch
from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from fairseq_smoe.translation.searches import NoRepeatedPhrases, search_for_words


class LanguageTokens:
    """The tokens that the task adds to a sentence of one direction.

    Attributes:
        source: index of the token in front of the source (with --lang-tok-replacing-bos-eos, in
            place of its end); None without one.
        target: index of the token that every translation starts with; None if there is none, or if
            it takes the place of the beginning of the sentence.
        replacing: whether the tokens take the place of beginning and end.
        all_targets: indices of the tokens of all target languages.
    """

    def __init__(self, args, langs, data_manager):
        source, target = args.langtoks["main"]
        languages = args.source_lang, args.target_lang
        self.replacing = args.lang_tok_replacing_bos_eos
        self.source = data_manager.get_encoder_langtok(*languages, source)
        self.target = None
        if target and not self.replacing:
            self.target = data_manager.get_decoder_langtok(args.target_lang, target)
        dictionary = data_manager.get_target_dictionary(args.target_lang)
        names = [get_lang_tok(lang, args.lang_tok_style, target or "tgt") for lang in langs]
        self.all_targets = {dictionary.index(name) for name in names} - {dictionary.unk()}

    @property
    def in_source(self):
        """Number of tokens that a source is longer by."""
        return int(self.source is not None and not self.replacing)

    def before(self, prefix_tokens, sample):
        """The tokens that the translations of a batch have to begin with.

        Args:
            prefix_tokens: (B, P) words of the target, or None.
            sample: the batch. If it has sentences of several directions, ``first_tokens``, (B,),
                has the target's token of each.
        """
        if self.target is None:
            return prefix_tokens
        src_tokens = sample["net_input"]["src_tokens"]
        token = src_tokens.new_full((len(src_tokens), 1), self.target)
        if "first_tokens" in sample:
            token = sample["first_tokens"].unsqueeze(1)
        return token if prefix_tokens is None else torch.cat([token, prefix_tokens], 1)

    def prepare(self, generator):
        """Let a generator count, align and print the words only."""
        generator.symbols_to_strip_from_output |= self.all_targets
        if hasattr(generator, "search"):  # a scorer of references does not search
            # in the middle of a sentence, they are no words
            generator.token_indices_to_suppress = torch.tensor(
                sorted(self.all_targets), dtype=torch.long
            )
            in_target = int(self.target is not None)
            search = search_for_words(
                generator.search, generator.tgt_dict, self.in_source, in_target
            )
            generator.search = search
            generator.should_set_src_lengths = getattr(search, "needs_src_lengths", False)
            if (blocker := generator.repeat_ngram_blocker) is not None:
                size = blocker.no_repeat_ngram_size
                generator.repeat_ngram_blocker = NoRepeatedPhrases(size, in_target)
            if self.target is not None:
                count_words(generator)
        if extract := getattr(generator, "extract_alignment", None):
            hidden = self.source, self.target

            def extract_alignment(attention, source, target, pad, eos):
                source, target = (
                    tokens if token is None else tokens.masked_fill(tokens == token, pad)
                    for tokens, token in zip((source, target), hidden)
                )
                return extract(attention, source, target, pad, eos)

            generator.extract_alignment = extract_alignment


def count_words(generator):
    """Take the language token, which the search produces as the first, out of the limits of the
    length: --min-len and --max-len-b."""
    generator.min_len += 1
    generator.max_len_b += 1
