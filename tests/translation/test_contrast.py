"""Self-contrast decoding: scores of the search against two plain passes of the whole model, its
invariants, and what else generators can do."""

from argparse import Namespace
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import toy_task
from fairseq.token_generation_constraints import pack_constraints
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.single_expert import SingleExpert, scrambled, viewed
from fairseq_smoe.translation.contrast import PENALTY, ContrastModel
from fairseq_smoe.translation.contrast_options import ContrastOptions
from fairseq_smoe.translation.layers import expert_layers

WORDS, SENTENCES = 300, 4
SYSTEMS = [name for name in toy_task.MODELS if name != "dense"]
BETAS = st.sampled_from([0.0, 0.2, 0.5, 0.9, 3.0])
ALPHAS = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dictionaries")
    toy_task.write_dictionaries(folder, ["en", "aa"], WORDS)
    return folder


@pytest.fixture(scope="module")
def random_model(dictionaries):
    """``random_model(*options, seed=0)``: ``(task, model, batch)``. Gates and outputs are peaked,
    as if the model had learned something, and the sentences are of uneven length."""
    made = {}

    def random_model(*options, seed=0):
        key = options, seed
        if key not in made:
            _, task, model, _ = toy_task.set_up(
                dictionaries, *options, lang_pairs="en-aa", seed=seed, decoder_layers=3
            )
            task.args.source_lang, task.args.target_lang = "en", "aa"
            with torch.no_grad():
                model.decoder.layer_norm.weight *= 5
                for _, layer in expert_layers(model):
                    for gate in layer.routed_block.gates:
                        gate.weight *= 20
            batch = toy_task.random_batch(seed, task, WORDS, SENTENCES, range(2, 8))
            made[key] = task, model.eval(), batch
        return made[key]

    return random_model


@pytest.fixture(scope="module")
def smoe(random_model):
    return random_model("--smoe-strata", "2-3", "--moe-freq", "1")


@pytest.fixture(scope="module")
def learned(data, trained):
    """The trained toy model with its test set."""
    task, model = toy_task.load(data, trained("smoe"))
    dataset = task.dataset("test")
    return task, model, dataset.collater([dataset[i] for i in range(len(dataset))])


def generator_of(task, model, **options):
    return task.build_generator([model], Namespace(**{"beam": 3, "max_len_b": 7, **options}))


def translate(loaded, prefix=None, constraints=None, sentences=None, **options):
    """Hypotheses of each sentence, best first."""
    task, model, batch = loaded
    if sentences is not None:
        batch = only(batch, sentences, task.source_dictionary.pad())
    generator = generator_of(task, model, **options)
    with torch.inference_mode():
        found = task.inference_step(generator, [model], batch, prefix, constraints)
    return found


def only(batch, sentences, pad):
    """Some sentences of a batch, without columns of padding alone."""
    net_input = batch["net_input"]
    tokens = net_input["src_tokens"][sentences]
    tokens = tokens[:, tokens.ne(pad).any(0)]
    chosen = {"src_tokens": tokens, "src_lengths": net_input["src_lengths"][sentences]}
    return {"id": torch.tensor(sentences), "net_input": chosen}


def words(found):
    return [[hypothesis["tokens"].tolist() for hypothesis in hypotheses] for hypotheses in found]


def assert_same(found, expected, atol=1e-5):
    """Scores are sums of logarithms, of up to some ten each, in float32."""
    rtol = 1e-6 if atol else 0
    assert words(found) == words(expected)
    for hypotheses, others in zip(found, expected):
        for one, other in zip(hypotheses, others):
            for name in ("score", "positional_scores"):
                torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------------
# against two plain passes


def log_probabilities(loaded, options, source, target, min_len=1, seed=1):
    """(T, V) of a translation's steps, and which tokens are in V_valid, from the equations: two
    passes over the whole prefix, one of them with single experts."""
    task, model, _ = loaded
    dictionary = task.target_dictionary
    pad, eos = dictionary.pad(), dictionary.eos()
    source = source[source != pad].unsqueeze(0)
    length = torch.tensor([source.shape[1]])
    previous = torch.cat([torch.tensor([eos]), target[:-1]]).unsqueeze(0)
    places = torch.arange(1, source.shape[1] + 1) << 32
    key_S = scrambled(source[0] + places, seed)
    key = scrambled(key_S.sum())
    key_T = torch.stack(
        [scrambled(key ^ token, step) for step, token in enumerate(previous[0].unbind())]
    )
    rank = options.rank()
    views = {"encoder": scrambled(key_S + key), "decoder": key_T}

    def run(side, weak, **inputs):
        part = getattr(model, side)
        blocks = [layer.routed_block for _, layer in expert_layers(part)]
        keys = views[side].unsqueeze(0)
        with viewed(blocks, SingleExpert(rank), keys) if weak else nullcontext():
            return part(**inputs)

    logs = []
    with torch.no_grad():
        for weak in (False, True):
            encoder_out = run(
                "encoder",
                weak and options.scmoe_weak_encoder,
                src_tokens=source,
                src_lengths=length,
            )
            inputs = {"prev_output_tokens": previous, "encoder_out": encoder_out}
            logs.append(run("decoder", weak, **inputs)[0][0].double().log_softmax(1))
    strong_TV, weak_TV = logs
    scores_TV = (1 + options.scmoe_beta) * strong_TV - options.scmoe_beta * weak_TV
    possible_TV = torch.ones_like(strong_TV, dtype=torch.bool)
    possible_TV[:, [pad, *task.language_tokens.all_targets]] = False
    possible_TV[: min_len + 1, eos] = False  # the language token is one of the steps
    p_TV = strong_TV.exp().masked_fill(~possible_TV, 0)
    within_TV = possible_TV & (p_TV >= options.scmoe_alpha * p_TV.amax(1, keepdim=True))
    within_TV[0, target[0]] = True  # the language token is forced
    if options.scmoe_alpha == 0:
        within_TV[:] = True
    masked_TV = scores_TV.masked_fill(~within_TV, -torch.inf)
    return masked_TV.log_softmax(1), within_TV


def assert_scored_by_the_equations(loaded, options, found, max_len=7, **more):
    """The first and the last hypothesis of every sentence: tokens in V_valid have the scores of the
    equations, others come behind. Returns how many there are of both."""
    _, _, batch = loaded
    inside = outside = 0
    exact = 3e-5 * (1 + 2 * options.scmoe_beta)  # rounding is multiplied as logarithms are
    for source, hypotheses in zip(batch["net_input"]["src_tokens"], found):
        for hypothesis in (hypotheses[0], hypotheses[-1]):
            tokens, scores = hypothesis["tokens"], hypothesis["positional_scores"]
            log_TV, within_TV = log_probabilities(loaded, options, source, tokens, **more)
            steps = torch.arange(len(tokens))
            steps = steps[: max_len + 1]  # the end at the limit is forced
            chosen = tokens[steps]
            expected, is_in = log_TV[steps, chosen], within_TV[steps, chosen]
            inside, outside = inside + int(is_in.sum()), outside + int((~is_in).sum())
            # sums of scores, from which fairseq takes those of the tokens, are less exact behind
            # a token that has lost the penalty
            good = is_in & (is_in.logical_not().cumsum(0) == 0)
            torch.testing.assert_close(
                scores[steps][good].double(), expected[good], atol=exact, rtol=0
            )
            torch.testing.assert_close(
                scores[steps][is_in].double(), expected[is_in], atol=2e-3, rtol=0
            )
            assert (scores[steps][~is_in] < -PENALTY / 2).all()
    return inside, outside


@settings(deadline=None, max_examples=15)
@given(
    beta=BETAS,
    alpha=ALPHAS,
    weak=st.sampled_from(["rank-1", "rank-2", "rank-4", "random"]),
    weak_encoder=st.booleans(),
    beam=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1),
)
def test_scores_are_those_of_the_equations(
    random_model, beta, alpha, weak, weak_encoder, beam, seed
):
    loaded = random_model("--smoe-strata", "2-3", "--moe-freq", "1", seed=seed)
    options = ContrastOptions(beta, alpha, weak, weak_encoder)
    found = translate(loaded, beam=beam, **vars(options))
    inside, outside = assert_scored_by_the_equations(loaded, options, found)
    assert inside > 20 and (outside == 0 or alpha > 0 and beam > 1)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("weak", ["rank-2", "random"])
def test_every_system(system, weak, random_model):
    """All gates, kinds of experts and arrangements."""
    loaded = random_model(*toy_task.MODELS[system])
    options = ContrastOptions(0.5, 0.1, weak)
    found = translate(loaded, beam=2, **vars(options))
    inside, _ = assert_scored_by_the_equations(loaded, options, found)
    assert inside > 20
    plain = translate(loaded, beam=2)
    best, plain_best = ([h[0]["score"].item() for h in each] for each in (found, plain))
    assert max(abs(one - other) for one, other in zip(best, plain_best)) > 1e-2


def test_layers_before_the_first_experts_are_computed_once(random_model):
    """And those behind them for both views, the encoder once for each sentence."""
    loaded = random_model("--smoe-strata", "2-2")
    task, model, batch = loaded
    rows = {}

    def count(name, _, inputs):
        rows.setdefault(name, inputs[0].shape[1])

    layers = {"encoder": model.encoder.layers[0], **dict(enumerate(model.decoder.layers))}
    hooks = [
        layer.register_forward_pre_hook(partial(count, name)) for name, layer in layers.items()
    ]
    translate(loaded, beam=4, scmoe_beta=0.5)
    assert rows == {"encoder": 4, 0: 16, 1: 16, 2: 32}
    rows.clear()
    translate(loaded, beam=4, scmoe_beta=0.5, scmoe_weak_encoder=True)
    assert rows == {"encoder": 8, 0: 32, 1: 32, 2: 32}
    for hook in hooks:
        hook.remove()


def hooks_of(model):
    blocks = [layer.expert_block for _, layer in expert_layers(model)]
    return [list(hooks) for b in blocks for hooks in (b._forward_hooks, b._forward_pre_hooks)]


def test_views_share_the_parameters_and_leave_no_trace(smoe):
    task, model, batch = smoe
    before, hooks = translate(smoe), hooks_of(model)
    generator = generator_of(task, model, scmoe_beta=0.5)
    assert isinstance(generator.model, ContrastModel)
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in generator.parameters()} == shared
    translate(smoe, scmoe_beta=0.5)
    broken = generator_of(task, model, scmoe_beta=0.5)
    broken.model.rule = None
    with pytest.raises(AttributeError), torch.no_grad():
        task.inference_step(broken, [model], batch)
    for _, layer in expert_layers(model):
        assert layer.routed_block.view is None
    assert hooks_of(model) == hooks
    assert_same(translate(smoe), before, atol=0)


# --------------------------------------------------------------------------------------
# invariants


@settings(deadline=None, max_examples=15)
@given(
    beam=st.integers(1, 7),
    weak=st.sampled_from(["rank-1", "rank-2", "random"]),
    weak_encoder=st.booleans(),
    lenpen=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 1),
)
def test_beta_0_without_mask_is_plain_decoding(
    random_model, beam, weak, weak_encoder, lenpen, seed
):
    loaded = random_model("--smoe-strata", "2-3", "--moe-freq", "1", seed=seed)
    options = {"beam": beam, "lenpen": lenpen, "max_len_a": 0.5}
    contrast = vars(ContrastOptions(0.0, 0.0, weak, weak_encoder))
    assert_same(translate(loaded, **options, **contrast), translate(loaded, **options))


def test_beta_0_without_mask_on_a_trained_model(learned):
    for beam in (1, 4):
        expected = translate(learned, beam=beam, max_len_b=20)
        found = translate(learned, beam=beam, max_len_b=20, scmoe_beta=0.0, scmoe_alpha=0.0)
        assert_same(found, expected)


def test_greedy_with_beta_0_is_plain_whatever_the_mask(smoe, learned):
    """But not the scores, which are renormalised."""
    for loaded in (smoe, learned):
        plain = translate(loaded, beam=1)
        for alpha in (0.1, 0.7):
            found = translate(loaded, beam=1, scmoe_beta=0.0, scmoe_alpha=alpha)
            assert words(found) == words(plain)
            for (one,), (other,) in zip(found, plain):
                assert one["score"] >= other["score"] - 1e-6


@pytest.mark.parametrize("weak_encoder", [False, True])
def test_alpha_1_is_greedy_for_any_beta(weak_encoder, smoe, learned):
    """Log-probabilities are 0, as each step behind the forced language token has one token."""
    for loaded in (smoe, learned):
        plain = words(translate(loaded, beam=1))
        for beta in (0.0, 0.5, 5.0, 100.0):
            options = vars(ContrastOptions(beta, 1.0, "rank-3", weak_encoder))
            found = translate(loaded, beam=1, **options)
            assert words(found) == plain
            for (hypothesis,) in found:
                assert (hypothesis["positional_scores"][1:-1] == 0).all()


def test_identical_views_do_not_depend_on_beta(random_model):
    """A gate that takes its best expert with weight 1, and rank-1; a model with one expert."""
    top_1 = ("--moe-gate", "threshold", "--moe-threshold", "0")
    top_1 += ("--moe-threshold-weights", "renormalised", "--smoe-strata", "2-3")
    for model, weak in ((top_1, "rank-1"), (("--smoe-strata", "1"), "rank-2")):
        loaded = random_model(*model)
        plain = translate(loaded, beam=4)
        for beta in (0.0, 0.5, 0.9, 4.0):
            for weak_encoder in (False, True):
                options = vars(ContrastOptions(beta, 0.0, weak, weak_encoder))
                assert_same(translate(loaded, beam=4, **options), plain, atol=2e-5)


@pytest.mark.parametrize("weak", ["rank-2", "random"])
@pytest.mark.parametrize("weak_encoder", [False, True])
def test_translations_do_not_depend_on_the_batch(weak, weak_encoder, smoe):
    options = {"beam": 3, **vars(ContrastOptions(0.7, 0.05, weak, weak_encoder))}
    together = translate(smoe, **options)
    alone = [translate(smoe, sentences=[i], **options)[0] for i in range(SENTENCES)]
    assert_same(alone, together, atol=1e-4)
    pairs = translate(smoe, sentences=[3, 1], **options)
    assert_same(pairs, [together[3], together[1]], atol=1e-4)


def test_random_experts_depend_on_the_seed(smoe):
    task, model, batch = smoe
    options = {"scmoe_beta": 0.9, "scmoe_weak": "random"}
    found = [translate(smoe, seed=seed, **options) for seed in (1, 1, 2)]
    assert_same(found[0], found[1], atol=0)
    assert words(found[2]) != words(found[0])
    assert_scored_by_the_equations(
        smoe, ContrastOptions(0.9, 0.1, "random"), found[2], max_len=7, seed=2
    )


def test_half_precision_does_not_overflow(random_model):
    _, model, _ = loaded = random_model("--smoe-strata", "2-3", seed=9)
    model.bfloat16()
    for hypotheses in translate(loaded, scmoe_beta=0.9):
        assert hypotheses[0]["score"].isfinite() and hypotheses[0]["score"] > -PENALTY
    model.float()


# --------------------------------------------------------------------------------------
# the search


def test_what_was_learned_is_still_known(learned):
    """A translation does not end where an end is improbable, however few other tokens are in
    V_valid."""
    task, _, batch = learned
    plain = translate(learned, beam=4, max_len_b=20)
    for options in ({}, {"scmoe_weak": "random"}, {"scmoe_weak_encoder": True}):
        for beam in (1, 4):
            found = translate(learned, beam=beam, max_len_b=20, scmoe_beta=0.5, **options)
            same = [one[0] == other[0] for one, other in zip(words(found), words(plain))]
            assert sum(same) > 0.9 * len(same)


def test_the_end_is_never_impossible(learned):
    """At the longest length it is forced, whatever its probability."""
    task, *_ = learned
    eos = task.target_dictionary.eos()
    for beam in (1, 3):
        for alpha in (0.1, 1.0):
            found = translate(learned, beam=beam, max_len_b=2, scmoe_beta=0.5, scmoe_alpha=alpha)
            for hypotheses in found:
                assert hypotheses[0]["tokens"][-1] == eos and len(hypotheses[0]["tokens"]) <= 4
                assert hypotheses[0]["score"] > -PENALTY / 10
    # longer than any of its own: only the end is in V_valid where it must not be
    for alpha in (0.1, 1.0):
        for search in ({"beam": 3}, {"beam": 2, "sampling": True}):
            options = {"scmoe_beta": 0.5, "scmoe_alpha": alpha, "min_len": 9, "max_len_b": 9}
            for hypotheses in translate(learned, **search, **options):
                assert {len(h["tokens"]) for h in hypotheses} == {11}
                assert all(h["score"].isfinite() for h in hypotheses)


def test_sampling(smoe):
    """As plain sampling with the same draws; from V_valid alone; with alpha 1 greedy."""
    search = {"sampling": True, "beam": 4, "temperature": 1.5}

    def sample(**options):
        torch.manual_seed(3)
        return translate(smoe, **search, **options)

    assert_same(sample(scmoe_beta=0.0, scmoe_alpha=0.0), sample())
    options = ContrastOptions(0.5, 0.3)
    for hypotheses in sample(**vars(options)):
        for hypothesis in hypotheses:
            steps = hypothesis["positional_scores"][:8]
            assert (steps > -PENALTY / 2).all()
    greedy = words(translate(smoe, beam=1))
    for hypotheses, (best,) in zip(words(sample(scmoe_beta=0.5, scmoe_alpha=1.0)), greedy):
        assert hypotheses == [best] * 4
    for more in ({"sampling_topk": 3}, {"sampling_topp": 0.8}):
        torch.manual_seed(3)
        found = translate(smoe, **search, **more, scmoe_beta=0.5)
        assert all(h["score"].isfinite() for hypotheses in found for h in hypotheses)


def test_temperature(smoe):
    """Flattens the contrast; V_valid is that of the model's own probabilities."""
    task, model, batch = smoe
    options = ContrastOptions(0.5, 0.1)
    for hypotheses, source in zip(
        translate(smoe, beam=1, temperature=3.0, **vars(options)), batch["net_input"]["src_tokens"]
    ):
        tokens = hypotheses[0]["tokens"]
        log_TV, within_TV = log_probabilities(smoe, options, source, tokens)
        expected = (log_TV / 3).log_softmax(1)
        steps = torch.arange(min(len(tokens), 8))
        torch.testing.assert_close(
            hypotheses[0]["positional_scores"][steps].double(),
            expected[steps, tokens[steps]],
            atol=3e-5,
            rtol=0,
        )


def test_a_prefix_is_kept_and_scored(smoe):
    """Also tokens that are far from V_valid, for sentences with prefixes of different lengths."""
    task, _, batch = smoe
    dictionary = task.target_dictionary
    first = dictionary.index("word0")
    prefix = torch.full((SENTENCES, 3), dictionary.pad())
    for sentence, length in enumerate((3, 1, 0, 2)):
        prefix[sentence, :length] = first + torch.arange(length) + 7 * sentence
    found = translate(smoe, prefix, beam=3, scmoe_beta=0.5, scmoe_alpha=0.5)
    for sentence, hypotheses in enumerate(found):
        own = prefix[sentence][prefix[sentence] != dictionary.pad()]
        source = batch["net_input"]["src_tokens"][sentence]
        for hypothesis in hypotheses:
            tokens, scores = hypothesis["tokens"], hypothesis["positional_scores"]
            assert tokens[1 : 1 + len(own)].tolist() == own.tolist()
            assert (scores[: 1 + len(own)] > -PENALTY / 2).all()
        assert hypotheses[0]["score"] > -PENALTY / 10
    # the first forced token is one of V_valid, which is greater by it
    options = ContrastOptions(0.5, 0.5)
    for sentence in (0, 1, 3):
        tokens = found[sentence][0]["tokens"]
        source = batch["net_input"]["src_tokens"][sentence]
        log_TV, within_TV = log_probabilities(smoe, options, source, tokens)
        score = found[sentence][0]["positional_scores"][1].double()
        if within_TV[1, tokens[1]]:
            expected = log_TV[1, tokens[1]]
        else:
            without = ContrastOptions(0.5, 0.0)
            full_TV, _ = log_probabilities(smoe, without, source, tokens)
            rest = full_TV[1][within_TV[1]].logsumexp(0)
            expected = full_TV[1, tokens[1]] - torch.logaddexp(rest, full_TV[1, tokens[1]])
        torch.testing.assert_close(score, expected, atol=3e-5, rtol=0)


def test_constraints_are_in_the_translation(learned):
    dictionary = learned[0].target_dictionary
    constrained = []
    for i in range(60):
        phrase = f"aa{i % 8} bb{(i + 3) % 8}" if i % 3 else f"bb{i % 8}"
        constrained.append(dictionary.encode_line(phrase, append_eos=False, add_if_not_exist=False))
    packed = pack_constraints([[phrase] for phrase in constrained])
    task, model, batch = learned
    options = {"beam": 4, "max_len_b": 20, "constraints": "ordered", "scmoe_beta": 0.5}
    generator = generator_of(task, model, **options)
    with torch.inference_mode():
        found = task.inference_step(generator, [model], batch, constraints=packed)
    for phrase, hypotheses in zip(constrained, found):
        text = " ".join(map(str, hypotheses[0]["tokens"].tolist()))
        assert " ".join(map(str, phrase.tolist())) in text
        assert (hypotheses[0]["positional_scores"] > -PENALTY / 2).sum() >= len(phrase) + 1


@pytest.mark.parametrize(
    "search",
    [
        {"diverse_beam_groups": 2, "diverse_beam_strength": 0.5},
        {"match_source_len": True},
        {"no_repeat_ngram_size": 1},
        {"unkpen": 3.0},
        {"print_alignment": "hard"},
    ],
    ids=lambda search: next(iter(search)),
)
def test_other_options_of_the_search(search, smoe, learned):
    """Without mask and beta as without contrast; with them, there is a translation."""
    for loaded in (smoe, learned):
        options = {"beam": 4, "max_len_b": 12, **search}
        plain = translate(loaded, **options)
        off = translate(loaded, **options, scmoe_beta=0.0, scmoe_alpha=0.0)
        assert words(off) == words(plain)
        if "print_alignment" in search:
            for one, other in zip(off, plain):
                assert one[0]["alignment"] == other[0]["alignment"]
        for hypotheses in translate(loaded, **options, scmoe_beta=0.5):
            assert hypotheses[0]["score"].isfinite()


def test_attention_is_that_of_the_strong_view(random_model):
    """Also where the last layer is the first one with experts."""
    for freq in ("1", "3"):
        loaded = random_model("--smoe-strata", "2-2", "--decoder-moe-freq", freq)
        plain = translate(loaded, beam=2)
        found = translate(loaded, beam=2, scmoe_beta=0.0, scmoe_alpha=0.0)
        for hypotheses, others in zip(found, plain):
            for one, other in zip(hypotheses, others):
                torch.testing.assert_close(one["attention"], other["attention"])


def test_empty_sentences(smoe):
    """Their translation is empty, and the others are those of a batch without them."""
    task, _, batch = smoe
    pad, eos = task.source_dictionary.pad(), task.source_dictionary.eos()
    more = {name: tensor.clone() for name, tensor in batch["net_input"].items()}
    more["src_tokens"][2] = pad
    more["src_tokens"][2, 0] = task.language_tokens.source
    more["src_tokens"][2, 1] = eos
    more["src_lengths"][2] = 2
    found = translate((*smoe[:2], {**batch, "net_input": more}), scmoe_beta=0.5)
    expected = translate(smoe, scmoe_beta=0.5)
    rest = [0, 1, 3]
    assert words(found)[2] == [[eos]] * 3
    assert_same([found[i] for i in rest], [expected[i] for i in rest], atol=1e-4)


def test_requested_capacity_is_that_of_the_strong_view(learned):
    task, model, _ = learned
    translate(learned, beam=1, max_len_b=2)  # makes the meter
    meter = task.capacity_meter
    counted = []
    for options in ({}, {"scmoe_beta": 0.0, "scmoe_alpha": 0.0}):
        for sums in meter.layers.values():
            sums[:] = [0, 0]
        translate(learned, beam=1, max_len_b=20, **options)
        counted.append(meter.summary()["layers"])
    assert counted[0] == counted[1]


# --------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scmoe_beta": -0.1}, "--scmoe-beta -0.1: expected 0 or more"),
        ({"scmoe_beta": float("nan")}, "--scmoe-beta nan: expected 0 or more"),
        ({"scmoe_beta": float("inf")}, "--scmoe-beta inf: expected 0 or more"),
        ({"scmoe_beta": 1.0, "scmoe_alpha": 1.5}, "--scmoe-alpha 1.5: expected a fraction"),
        ({"scmoe_beta": 1.0, "scmoe_alpha": -0.5}, "--scmoe-alpha -0.5: expected a fraction"),
        ({"scmoe_beta": 1.0, "scmoe_weak": "rank-0"}, "--scmoe-weak rank-0: expected rank-K"),
        ({"scmoe_beta": 1.0, "scmoe_weak": "2"}, "--scmoe-weak 2: expected rank-K"),
        ({"scmoe_beta": 1.0, "scmoe_weak": "rank--1"}, "--scmoe-weak rank--1: expected rank-K"),
        ({"scmoe_beta": 1.0, "scmoe_weak": "randomly"}, "--scmoe-weak randomly: expected rank-K"),
        ({"scmoe_alpha": 0.2}, "--scmoe-alpha 0.2: needs --scmoe-beta"),
        ({"scmoe_weak": "random"}, "--scmoe-weak random: needs --scmoe-beta"),
        ({"scmoe_weak_encoder": True}, "--scmoe-weak-encoder: needs --scmoe-beta"),
        (
            {"scmoe_beta": 0.5, "score_reference": True},
            "--scmoe-beta 0.5 with --score-reference: is for translating",
        ),
    ],
    ids=str,
)
def test_wrong_options(options, message, smoe):
    task, model, _ = smoe
    with pytest.raises(OptionError, match=message):
        generator_of(task, model, **options)


def test_models_without_two_views(random_model):
    refused = [
        (("--moe-freq", "0"), {}, "the model has no experts"),
        (("--decoder-moe-freq", "0"), {}, "give --scmoe-weak-encoder, too"),
        (
            ("--encoder-moe-freq", "0"),
            {"scmoe_weak_encoder": True},
            "--scmoe-weak-encoder: the encoder of the model has no experts",
        ),
        (("--cross-self-attention",), {}, "trained with --cross-self-attention"),
    ]
    for words, options, message in refused:
        task, model, _ = random_model(*words)
        with pytest.raises(OptionError, match=message):
            generator_of(task, model, scmoe_beta=0.5, **options)
    loaded = random_model("--decoder-moe-freq", "0")
    options = ContrastOptions(0.5, 0.1, "rank-2", True)
    found = translate(loaded, **vars(options))
    assert_scored_by_the_equations(loaded, options, found)
    task, model, _ = loaded
    with pytest.raises(OptionError, match="two views of one model, and --path names 2"):
        task.build_generator([model, model], Namespace(beam=2, scmoe_beta=0.5))
