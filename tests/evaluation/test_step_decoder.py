"""The decoder for beam search against fairseq's own."""

import pytest
import torch
import toy_task
from fairseq.sequence_generator import EnsembleModel
from toy_task import random_batch, set_up

from fairseq_smoe.evaluation.lean_beam import LeanBeamModel
from fairseq_smoe.evaluation.step_decoder import can_step


def run(model, encoder_outs, script):
    """Log probabilities of every step, with hypotheses reordered in between."""
    states, found, first = [{}], [], True
    for tokens, order in script:
        if not first:
            model.reorder_incremental_state(states, order)
            encoder_outs = model.reorder_encoder_out(encoder_outs, order)
        first = False
        found.append(model.forward_decoder(tokens, encoder_outs, states)[0].clone())
    return found


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("name", ["dense", "smoe", "cmr"])
def test_log_probabilities_of_every_step(name, beam, data):
    _, task, model, _ = set_up(data, *toy_task.MODELS[name], "--decoder-layers", "3")
    model.eval()
    sample = random_batch(3, task, 20, 5, range(3, 9))
    models = {"stock": EnsembleModel([model]), "lean": LeanBeamModel([model])}
    assert models["lean"]._steps is not None
    generator = torch.Generator().manual_seed(1)
    rows, sentences = 5 * beam, 5
    tokens = torch.full((rows, 1), 2)
    order, script = torch.arange(rows), []
    for step in range(40):  # beyond the room for keys and values
        script.append((tokens, order))
        within = torch.randint(beam, (sentences, beam), generator=generator)
        order = (torch.arange(sentences)[:, None] * beam + within).flatten()
        if step % 10 == 5:  # a sentence is finished
            gone = step // 10
            order = order.view(sentences, beam)[torch.arange(sentences) != gone].flatten()
            sentences -= 1
        new = torch.randint(4, 24, (len(order), 1), generator=generator)
        tokens = torch.cat([tokens[order], new], dim=1)
    with torch.inference_mode():
        found = {}
        for kind, ensemble in models.items():
            ensemble.set_decoder_beam_size(beam)
            encoded = model.encoder(
                sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"]
            )
            repeated = torch.arange(5).repeat_interleave(beam)
            outs = [model.encoder.reorder_encoder_out(encoded, repeated)]
            found[kind] = run(ensemble, outs, script)
    assert len(found["lean"][-1]) == sentences * beam < rows
    for ours, theirs in zip(found["lean"], found["stock"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_parameters_stay_where_the_model_has_them(data):
    """The same values under the same names, in no more memory, also after a second search."""
    _, _, model, _ = set_up(data, *toy_task.MODELS["smoe"])
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        LeanBeamModel([model])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    attention = model.decoder.layers[0].self_attn
    storages = {getattr(attention, f"{n}_proj").weight.untyped_storage().data_ptr() for n in "qkv"}
    assert len(storages) == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--post-norm", "--moe-freq", "0"),
        ("--layernorm-embedding",),
        ("--no-cross-attention",),
    ],
    ids=" ".join,
)
def test_other_decoders_are_left_to_fairseq(options, data):
    _, _, model, _ = set_up(data, *options)
    assert not can_step(model.decoder)
    assert LeanBeamModel([model])._steps is None
