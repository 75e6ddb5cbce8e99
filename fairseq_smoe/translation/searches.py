"""fairseq's search strategies for sentences that begin with a language token.

The token of the target language is forced as the first token of every hypothesis. fairseq's
strategies would take it for a word.
"""

import math

import torch
from fairseq.search import (
    BeamSearch,
    DiverseBeamSearch,
    LengthConstrainedBeamSearch,
    LexicallyConstrainedBeamSearch,
    Sampling,
    Search,
)


def search_for_words(search, dictionary, in_source, in_target):
    """The strategy that treats words as ``search`` treats tokens.

    Args:
        search: of fairseq.
        dictionary: of the target.
        in_source, in_target: number of language tokens in front of each, 0 or 1.
    """
    if isinstance(search, LexicallyConstrainedBeamSearch):
        return ConstrainedWords(dictionary, search.representation, in_target)
    if isinstance(search, DiverseBeamSearch):
        return DiverseWords(dictionary, search.num_groups, -search.diversity_strength, in_target)
    if isinstance(search, LengthConstrainedBeamSearch):
        return AsManyWords(dictionary, in_target - in_source)
    return search


class ConstrainedWords(LexicallyConstrainedBeamSearch):
    """--constraints. fairseq's would prefer impossible hypotheses, which begin with a constraint
    instead of the language token, because they have come further."""

    def __init__(self, dictionary, representation, num_forced):
        super().__init__(dictionary, representation)
        self.num_forced = num_forced
        self.plain = BeamSearch(dictionary)

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """See :meth:`fairseq.search.Search.step`."""
        if step < self.num_forced:
            # states for as many candidates as the generator chooses the next beams from
            self.constraint_states = [states * 2 for states in self.constraint_states]
            return self.plain.step(step, lprobs, scores)
        if step == self.num_forced > 0:
            # only the first beam is possible so far, as at the start of any search
            self._forbid_ends(lprobs)
            lprobs = lprobs + scores[:, :, step - 1].unsqueeze(-1)
            step = 0
        return super().step(step, lprobs, scores)

    def _forbid_ends(self, lprobs):
        """No empty translations where there are constraints, (B, beam, V)."""
        for sentence, states in enumerate(self.constraint_states):
            if not states[0].finished:
                lprobs[sentence, :, self.eos] = -math.inf


class DiverseWords(Search):
    """--diverse-beam-groups: diverse beam search (Vijayakumar et al. 2016).

    A beam pays for every word that beams of earlier groups take at the same step: ``strength``,
    times one more than the words that both have in common so far, as in fairseq. fairseq's own
    ends with an IndexError at the second batch, and lets hypotheses that have ended go on.
    """

    def __init__(self, dictionary, num_groups, strength, num_forced):
        super().__init__(dictionary)
        self.num_groups = num_groups
        self.strength = strength
        self.num_forced = num_forced

    def prune_sentences(self, batch_idxs):
        self.candidate_groups = self.candidate_groups[batch_idxs]
        self.num_ended = self.num_ended[batch_idxs]

    def update_constraints(self, active_hypos):
        """Called with the candidates that become the next beams, (B, beam)."""
        self.groups = self.candidate_groups.gather(1, active_hypos)

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """See :meth:`fairseq.search.Search.step`."""
        batch, beam, vocabulary = lprobs.size()
        size = beam // self.num_groups
        if step == 0:
            number = torch.arange(beam, device=lprobs.device)
            self.groups = (number // size).expand(batch, beam)
            self.num_ended = self.groups.new_zeros(batch, self.num_groups)
            # all beams of a group are the same
            lprobs = lprobs.masked_fill((number % size > 0)[None, :, None], -math.inf)
        else:
            lprobs = lprobs + scores[:, :, step - 1].unsqueeze(-1)
        words = prev_output_tokens.view(batch, beam, -1)[:, :, 1 + self.num_forced :]
        common = (words.unsqueeze(1) == words.unsqueeze(2)).sum(-1)  # (B, beam, beam)
        penalty = torch.zeros_like(lprobs)
        found = []  # of each group, twice as many as it has beams, in case half are ends
        for group in range(self.num_groups):
            complete = self.num_ended[:, group, None] >= size
            others = ((self.groups != group) | complete).unsqueeze(-1)
            of_group = (lprobs - self.strength * penalty).masked_fill(others, -math.inf)
            values, indices = of_group.view(batch, -1).topk(2 * size)
            beams, tokens = indices // vocabulary, indices % vocabulary
            self._end(group, values[:, :size], tokens[:, :size])
            found.append((values, tokens, beams, torch.full_like(beams, group)))
            if step >= self.num_forced:
                taken = tokens[:, None, :size].expand(batch, beam, size)
                paid = 1 + common.gather(2, beams[:, None, :size].expand_as(taken))
                possible = values[:, None, :size] > -math.inf
                penalty.scatter_add_(2, taken, (paid * possible).to(penalty))
        values, tokens, beams, self.candidate_groups = self._order(found, size)
        return values, tokens, beams

    def _end(self, group, values, tokens):
        """Count the hypotheses of a group that end, and forbid more of them than its beams."""
        ends = (tokens == self.eos) & (values > -math.inf)
        room = values.size(1) - self.num_ended[:, group, None]
        too_many = ends & (ends.cumsum(1) > room)
        values.masked_fill_(too_many, -math.inf)
        self.num_ended[:, group] += (ends & ~too_many).sum(1)

    def _order(self, found, size):
        """Put first what the generator takes, so that every group keeps its number of beams: the
        best of every group, then what replaces those of its hypotheses that end."""
        found = [torch.stack(parts, 1) for parts in zip(*found)]  # (B, groups, 2 size)
        values, tokens = found[:2]
        ends = (tokens == self.eos) & (values > -math.inf)
        num_ended = ends[..., :size].sum(-1, keepdim=True)
        go_on = ~ends[..., size:]
        replacing = go_on & (go_on.cumsum(-1) <= num_ended)
        order = replacing.flatten(1).sort(dim=1, descending=True, stable=True).indices
        return [
            torch.cat([x[..., :size].flatten(1), x[..., size:].flatten(1).gather(1, order)], 1)
            for x in found
        ]


class AsManyWords(LengthConstrainedBeamSearch):
    """--match-source-len. fairseq's counts the end of the source, too, and translates into one word
    more.

    Args:
        num_more: tokens that a translation has in front more than the source.
    """

    def __init__(self, dictionary, num_more):
        super().__init__(dictionary, min_len_a=1, min_len_b=0, max_len_a=1, max_len_b=0)
        self.num_more = num_more

    def set_src_lengths(self, src_lengths):
        super().set_src_lengths(src_lengths - 1 + self.num_more)

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """See :meth:`fairseq.search.Search.step`."""
        others = torch.arange(lprobs.size(-1), device=lprobs.device) != self.eos
        complete = (step >= self.src_lengths)[:, None, None]
        lprobs.masked_fill_(complete & others, -math.inf)
        return super().step(step, lprobs, scores)


class NoRepeatedPhrases(torch.nn.Module):
    """--no-repeat-ngram-size. fairseq's compares with the padding behind a hypothesis instead of
    its last words, and so lets everything repeat."""

    def __init__(self, size, num_forced):
        super().__init__()
        self.size = size
        self.num_forced = num_forced

    def forward(self, tokens, lprobs, bsz, beam_size, step):
        """Make words impossible, (B * beam, V), that would end a phrase that is there already."""
        words = tokens[:, 1 + self.num_forced : step + 1]
        if words.size(1) >= self.size:
            phrases = words.unfold(1, self.size, 1)  # (B * beam, number, size)
            last = words[:, words.size(1) + 1 - self.size :].unsqueeze(1)
            begun = (phrases[..., :-1] == last).all(-1)
            row, phrase = begun.nonzero(as_tuple=True)
            lprobs[row, phrases[row, phrase, -1]] = -math.inf
        return lprobs


class SamplingWhatIsPossible(Sampling):
    """--sampling where tokens that are not to be drawn have lost a number of nats, such that their
    probability is 0. fairseq's ends with an error where no others are left.

    Args:
        penalty: the number of nats.
    """

    def __init__(self, dictionary, top_k, top_p, penalty):
        super().__init__(dictionary, top_k, top_p)
        self.penalty = penalty

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """See :meth:`fairseq.search.Search.step`."""
        best = lprobs.amax(dim=-1, keepdim=True)
        lprobs = torch.where(best < -self.penalty / 2, lprobs - best, lprobs)
        return super().step(step, lprobs, scores, prev_output_tokens, original_batch_idxs)
