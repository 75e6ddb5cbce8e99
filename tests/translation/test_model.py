"""The whole model: where its experts sit, what its parameters are called, and that a translation
depends on nothing but the sentence."""

import random

import pytest
import torch
import toy_task
from toy_task import load, set_up


def gates_of(model):
    return {n: tuple(p.shape) for n, p in model.state_dict().items() if ".gates." in n}


# --------------------------------------------------------------------------------------
# structure


def test_parameter_names_and_shapes(data):
    """Checkpoints rely on them."""
    _, _, model, _ = set_up(data, smoe_strata="2-3")
    block = "decoder.layers.1.expert_block."
    ours = {n: tuple(p.shape) for n, p in model.state_dict().items() if n.startswith(block)}
    assert {name[len(block) :]: shape for name, shape in ours.items()} == {
        "norms.0.weight": (64,),
        "norms.0.bias": (64,),
        "norms.1.weight": (64,),
        "norms.1.bias": (64,),
        "gates.0.weight": (5, 64),
        "gates.1.weight": (3, 64),
        "experts.fc1_weight": (5, 64, 128),
        "experts.fc1_bias": (5, 128),
        "experts.fc2_weight": (5, 128, 64),
        "experts.fc2_bias": (5, 64),
    }
    # the rest is fairseq's own; an expert layer has no FFN and no LayerNorm for it
    assert not any(n.startswith("decoder.layers.1.fc") for n in model.state_dict())
    assert not any(n.startswith("decoder.layers.1.final_layer_norm") for n in model.state_dict())
    assert "decoder.layers.0.fc1.weight" in model.state_dict()
    assert "decoder.layers.1.self_attn.k_proj.weight" in model.state_dict()


@pytest.mark.parametrize("name", toy_task.MODELS)
def test_state_dict_round_trip(name, data):
    _, task, model, _ = set_up(data, *toy_task.MODELS[name], seed=1)
    _, _, other, _ = set_up(data, *toy_task.MODELS[name], seed=2)
    state = {n: p.clone() for n, p in model.state_dict().items()}
    changed = [n for n, p in other.state_dict().items() if not torch.equal(p, state[n])]
    assert any("expert_block" in n for n in changed) or name == "dense"
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(p, state[n]) for n, p in other.state_dict().items())


@pytest.mark.parametrize(
    "options, layers",
    [
        ({"moe_freq": 2}, {"encoder": [1, 3], "decoder": [1, 3]}),
        ({"moe_freq": 1}, {"encoder": [0, 1, 2, 3], "decoder": [0, 1, 2, 3]}),
        ({"moe_freq": 3}, {"encoder": [2], "decoder": [2]}),
        ({"encoder_moe_freq": 4, "decoder_moe_freq": 0}, {"encoder": [3], "decoder": []}),
    ],
)
def test_every_nth_layer_is_an_expert_layer(options, layers, data):
    _, _, model, _ = set_up(data, smoe_strata="2-2", encoder_layers=4, decoder_layers=4, **options)
    for side, expected in layers.items():
        found = [
            i
            for i in range(4)
            if f"{side}.layers.{i}.expert_block.gates.0.weight" in model.state_dict()
        ]
        assert found == expected


def test_expert_count_is_a_single_stratum(data):
    by_count, by_strata = (
        set_up(data, *words)[2] for words in (["--moe-expert-count", "8"], ["--smoe-strata", "8"])
    )
    assert gates_of(by_count) == gates_of(by_strata) != {}
    for parameter, same in zip(by_count.parameters(), by_strata.parameters()):
        assert torch.equal(parameter, same)


# --------------------------------------------------------------------------------------
# training


def mixed_batch(task):
    """Sentences of all directions and lengths from the validation set."""
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    return dataset.collater([dataset[i] for i in range(0, len(dataset), 3)])


def test_padding_is_not_routed(data):
    """Every token makes one pass or more, padding none; in the encoder it stands on the left, in
    the decoder on the right."""
    _, task, model, _ = set_up(data, smoe_strata="2-2")
    inputs = mixed_batch(task)["net_input"]
    model(**inputs)
    for layer, tokens in (
        (model.encoder.layers[1], inputs["src_tokens"]),
        (model.decoder.layers[1], inputs["prev_output_tokens"]),
    ):
        is_padding = tokens.eq(task.source_dictionary.pad())
        assert is_padding.any()
        assert torch.equal(layer.routing_stats.passes == 0, is_padding)


def gradients(data, *words, gate_loss_weight=1.0, **options):
    """Gradient of every parameter on one batch of several directions; dropout on."""
    _, task, model, criterion = set_up(data, *words, moe_gate_loss_wt=gate_loss_weight, **options)
    model.train()
    torch.manual_seed(1)
    loss, sample_size, _ = criterion(model, mixed_batch(task))
    (loss / sample_size).backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["smoe", "stacking", "cmr", "mpoe", "pesc"])
def test_checkpoint_activations_changes_no_gradient(name, data):
    """Nor does it lose that of the balance loss, which is no output of a layer."""
    words = [*toy_task.MODELS[name], "--dropout", "0.1"]
    loss, expected = gradients(data, *words)
    same_loss, actual = gradients(data, *words, "--checkpoint-activations")
    _, without = gradients(data, *words, gate_loss_weight=0.0)
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)
    for parameter in expected:
        if ".gates.0." in parameter:
            difference = (actual[parameter] - without[parameter]).norm()
            assert difference > 0.1 * without[parameter].norm(), parameter


def test_all_parameters_are_trained(data):
    """None is left without a gradient, on which training on several processes would stop."""
    for name, words in toy_task.MODELS.items():
        _, found = gradients(data, *words)
        assert [n for n, gradient in found.items() if gradient is None] == [], name


# --------------------------------------------------------------------------------------
# translation


@pytest.fixture(scope="module")
def translator(data, trained):
    """``(task, model)`` of a trained SMoE model, with its test set."""
    return load(data, trained("smoe"))


def batch_of(task, indices):
    dataset = task.dataset("test")
    return dataset.collater([dataset[i] for i in indices])


def translate(task, model, indices, beam=4):
    """``{sentence: hypotheses, best first}`` of sentences translated in one batch."""
    from argparse import Namespace

    generator = task.build_generator([model], Namespace(beam=beam, max_len_b=20))
    batch = batch_of(task, indices)
    hypotheses = task.inference_step(generator, [model], batch)
    return dict(zip(batch["id"].tolist(), hypotheses))


def assert_same_translation(hypotheses, others):
    for hypothesis, other in zip(hypotheses, others):
        assert hypothesis["tokens"].tolist() == other["tokens"].tolist()
        torch.testing.assert_close(
            hypothesis["positional_scores"], other["positional_scores"], rtol=0, atol=1e-5
        )


def test_translation_depends_on_nothing_but_the_sentence(translator):
    """Alone, in any batch, in any order, beside any padding: same tokens, same scores."""
    task, model = translator
    lengths = [len(task.dataset("test")[i]["source"]) for i in range(12)]
    assert min(lengths) < max(lengths), "batches of these sentences have padding"
    alone = {i: translate(task, model, [i])[i] for i in range(12)}
    shuffled = random.Random(1).sample(range(12), 12)
    for batch in (range(12), shuffled, [lengths.index(min(lengths)), lengths.index(max(lengths))]):
        for i, hypotheses in translate(task, model, batch).items():
            assert_same_translation(hypotheses, alone[i])


def test_scores_of_step_by_step_decoding_are_those_of_the_whole_sentence(translator):
    """The generator decodes incrementally; teacher forcing sees all positions at once."""
    task, model = translator
    for i, hypotheses in translate(task, model, range(6)).items():
        batch = batch_of(task, [i])
        for hypothesis in hypotheses:
            tokens = hypothesis["tokens"].unsqueeze(0)
            start = torch.full((1, 1), task.target_dictionary.eos())
            with torch.no_grad():
                output = model(
                    batch["net_input"]["src_tokens"],
                    batch["net_input"]["src_lengths"],
                    torch.cat([start, tokens[:, :-1]], dim=1),
                )
                lprobs = model.get_normalized_probs(output, log_probs=True)
            scores = lprobs.gather(2, tokens.unsqueeze(2)).view(-1)
            torch.testing.assert_close(scores, hypothesis["positional_scores"], rtol=0, atol=1e-5)


def test_incremental_decoding_equals_the_full_forward_pass(translator):
    """All logits of a padded batch, of every position."""
    task, model = translator
    batch = batch_of(task, range(8))
    encoder_out = model.encoder(batch["net_input"]["src_tokens"], batch["net_input"]["src_lengths"])
    previous = batch["net_input"]["prev_output_tokens"]
    is_token = previous.ne(task.target_dictionary.pad())
    with torch.no_grad():
        full, _ = model.decoder(previous, encoder_out=encoder_out)
        state = {}
        for step in range(previous.shape[1]):
            logits, _ = model.decoder(
                previous[:, : step + 1], encoder_out=encoder_out, incremental_state=state
            )
            here = is_token[:, step]
            torch.testing.assert_close(logits[here, -1], full[here, step], rtol=0, atol=1e-4)
