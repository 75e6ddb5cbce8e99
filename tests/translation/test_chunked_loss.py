"""--chunked-loss: losses and gradients are those of all logits at once."""

import pytest
import torch
import toy_task
from fairseq import utils
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.chunked_loss import TargetLoss, label_smoothed_loss

PAD = 1


def of_all_logits(features, weight, target, smoothing, untrained=0):
    """What fairseq computes; ``target`` with padding."""
    logits = features @ weight.T
    if untrained:
        logits[:, -untrained:] = -torch.inf
    log_p = utils.log_softmax(logits, dim=-1)
    loss, nll = label_smoothed_nll_loss(log_p, target, smoothing, ignore_index=PAD)
    correct = log_p.argmax(1) == target
    return loss, nll, correct[target != PAD].sum()


def of_chunks(features, weight, target, smoothing, untrained=0, chunk=3):
    loss = TargetLoss(target.view(1, -1), PAD, 0, smoothing, chunk, find_correct=True)
    loss, nll_T, correct_T = loss(features.unsqueeze(0), weight, untrained)
    return loss, nll_T.sum(), correct_T.sum()


def with_gradients(compute, features, weight, *args, factor=1.0):
    leaves = [t.clone().requires_grad_() for t in (features, weight)]
    outputs = compute(*leaves, *args)
    (factor * outputs[0]).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]


def make(tokens, width, size, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(size, width, generator=generator)
    target = torch.randint(0, size, (tokens,), generator=generator)
    return features.to(dtype), weight.to(dtype), target


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20),
    width=st.integers(1, 9),
    chunk=st.integers(1, 30),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    size=st.integers(2, 40),
    seed=st.integers(0, 99),
    padding=st.sampled_from(["some", "all", "none"]),
)
def test_outputs_and_gradients(tokens, width, chunk, smoothing, size, seed, padding):
    features, weight, target = make(tokens, width, size, seed)
    if padding != "some":
        target[:] = PAD if padding == "all" else 0
    expected = with_gradients(of_all_logits, features, weight, target, smoothing, factor=0.7)
    args = (features, weight, target, smoothing, 0, chunk)
    torch.testing.assert_close(with_gradients(of_chunks, *args, factor=0.7), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_untrained_tokens(smoothing):
    """As with all logits, the smoothed loss is infinite and its gradient is not; without smoothing,
    the loss of all logits is not a number."""
    features, weight, target = make(9, 4, 12)
    target %= 9
    expected = with_gradients(of_all_logits, features, weight, target, smoothing, 3)
    found = with_gradients(of_chunks, features, weight, target, smoothing, 3)
    torch.testing.assert_close(found[1:], expected[1:])
    assert not expected[0].isfinite()
    assert found[0] == (expected[0] if smoothing else found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearly_as_exact_as_all_logits_at_once(dtype):
    """In float16 with a factor as that of the loss, without which gradients would be 0."""
    factor = 2.0**10 if dtype == torch.float16 else 1.0
    features, weight, target = make(50, 16, 3000)
    features, weight = features.to(dtype), (weight / 4).to(dtype)
    args = (features, weight, target, 0.1)
    exact = with_gradients(of_all_logits, features.float(), weight.float(), target, 0.1)
    errors = []
    for compute in (of_all_logits, of_chunks):
        found = with_gradients(compute, *args, factor=factor)
        assert found[3].dtype == found[4].dtype == dtype
        assert torch.allclose(found[0], exact[0], rtol=1e-3)
        gradients = [g.float() / factor for g in found[3:]]
        errors.append([(g - e).norm() / e.norm() for g, e in zip(gradients, exact[3:])])
    assert all(ours < 1.4 * theirs for theirs, ours in zip(*errors)), errors


def test_only_what_needs_a_gradient_gets_one():
    features, weight, target = make(7, 4, 12)
    expected = with_gradients(of_all_logits, features, weight, target, 0.1)
    for trained in (0, 1):
        leaves = [features.clone(), weight.clone()]
        leaves[trained].requires_grad_()
        label_smoothed_loss(*leaves, target, 0.1, 3)[0].backward()
        assert leaves[1 - trained].grad is None
    with torch.no_grad():
        outputs = of_chunks(features.requires_grad_(), weight, target, 0.1)
    torch.testing.assert_close(list(outputs), expected[:3])


def test_autocast_computes_the_logits_in_its_precision():
    features, weight, target = make(20, 8, 30)
    with torch.autocast("cpu", torch.bfloat16):
        expected = with_gradients(of_all_logits, features, weight, target, 0.1)
        found = with_gradients(of_chunks, features, weight, target, 0.1)
    torch.testing.assert_close(found[:3], expected[:3])
    torch.testing.assert_close(found[3:], expected[3:], rtol=0.02, atol=0.02)


# --------------------------------------------------------------------------------------
# in a model


def results(data, *more):
    """Losses of training and validation, and all parameters after some updates."""
    from fairseq_smoe.training.trainer import SMoETrainer

    cfg, task, model, criterion = toy_task.set_up(
        data,
        *("--label-smoothing", "0.1", *more),
        # not Adam, which divides by the gradient's size, also where it is mere rounding
        **{"optimizer": "sgd", "momentum": 0.9, "lr": 0.02, "clip_norm": 0.5, "warmup_updates": 1},
    )
    trainer = SMoETrainer(cfg, task, model, criterion)
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    batch = dataset.collater([dataset[i] for i in range(len(dataset))])
    logs = [trainer.train_step([batch])[key] for _ in range(4) for key in ("loss", "nll_loss")]
    criterion.eval(), model.eval()
    with torch.no_grad():
        _, _, logged = criterion(model, batch)
    values = {name: torch.as_tensor(value).float() for name, value in logged.items()}
    return logs, values, dict(model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        ["--smoe-strata", "2-2", "--report-accuracy", "--ignore-prefix-size", "1"],
        ["--smoe-strata", "2-2", "--checkpoint-activations"],
        ["--moe-freq", "0", "--train-only", "fc1,embed_tokens[5:]"],
    ],
)
def test_a_training_is_the_same(data, options):
    stock, ours = (results(data, *options, *more) for more in ([], ["--chunked-loss", "50"]))
    assert stock[1].keys() == ours[1].keys() > {"direction_nll_en-aa", "nll_loss"}
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_other_models_and_values_are_refused(data):
    with pytest.raises(OptionError, match=r"^--chunked-loss -1: expected"):
        toy_task.set_up(data, "--chunked-loss", "-1")
    _, task, model, criterion = toy_task.set_up(
        data, arch="transformer_tiny", chunked_loss=8, label_smoothing=0.1
    )
    with pytest.raises(OptionError, match="^--chunked-loss 8: needs --arch smoe_transformer"):
        criterion(model, toy_task.random_batch(1, task, 2, 3, range(2, 5)))
