"""Training the router of a network, and testing how well it chooses.

Letters in names: T tokens, D model dim, P small experts, W units of each.
"""

import torch
import torch.nn.functional as F

from fairseq_smoe.moe.small_router import centres, scores, true_scores

BATCH, EPOCHS, RATE = 512, 30, 0.01  # of the paper's code
TEST_SHARE = 0.1
SHARE_IF_ALL = 0.2  # of the small experts, by which routers are compared if all are kept
SHARES = (0.1, 0.25, 0.5)  # in reports
AT_ONCE = 1024  # tokens


def fit(select, weight_PWD, bias_PW, tokens_TD, kept, seed):
    """A router of a network whose units are in their new order.

    Args:
        select: "mlp", "similarity" or "oracle".
        weight_PWD, bias_PW: first layer.
        tokens_TD: what goes into it, in a random order; may be empty.
        kept: small experts that a token keeps.
        seed: of the order of the batches.

    Returns:
        ``(parameters, coverage)``: ``{name: tensor}``, and for some numbers of small experts the
        share of all activation that those hold which the router chooses, and which the oracle does,
        on the tokens that it was not trained on.
    """
    number = len(weight_PWD)
    true_TP = _true_scores(weight_PWD, bias_PW, tokens_TD)
    num_test = max(1, round(TEST_SHARE * len(tokens_TD))) if len(tokens_TD) else 0
    test, train = slice(num_test), slice(num_test, None)
    parameters = {}
    if select != "oracle":
        parameters["router_in"] = centres(weight_PWD)
    if select == "mlp":
        parameters["router_out"] = torch.eye(number)
        if len(tokens_TD[train]):
            compared = kept if kept < number else max(1, round(SHARE_IF_ALL * number))
            sets = [(tokens_TD[part], true_TP[part]) for part in (train, test)]
            parameters = _train(parameters, *sets, compared, seed)
    chosen_TP = true_TP[test]
    if select != "oracle":
        chosen_TP = scores(select, tokens_TD[test], **_as_arguments(parameters))
    counts = sorted({kept, *(max(1, round(share * number)) for share in SHARES)})
    found = [
        {
            "kept": count,
            "router": coverage(chosen_TP, true_TP[test], count),
            "oracle": coverage(true_TP[test], true_TP[test], count),
        }
        for count in counts
    ]
    return parameters, found if num_test else []


def coverage(score_TP, true_TP, kept):
    """Share of all activation that the ``kept`` small experts with the highest scores hold."""
    total = true_TP.sum().item()
    if not total:
        return 1.0
    best = score_TP.topk(kept, dim=1).indices
    return true_TP.gather(1, best).sum().item() / total


def _true_scores(weight_PWD, bias_PW, tokens_TD):
    weight, bias = weight_PWD.flatten(0, 1), bias_PW.flatten()
    found = [
        true_scores(F.linear(tokens, weight, bias).relu_(), len(bias_PW))
        for tokens in tokens_TD.split(AT_ONCE)
    ]
    return torch.cat(found)


def _train(start, train, test, kept, seed):
    """The parameters with the best coverage of the test set, at the start or after any epoch.

    The target of a small expert is the sum of its positive activations, divided by the greatest of
    the batch.
    """
    tokens_TD, true_TP = train
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=RATE)
    random = torch.Generator().manual_seed(seed)

    def covered():
        with torch.no_grad():
            return coverage(scores("mlp", test[0], **_as_arguments(parameters)), test[1], kept)

    best, kept_parameters = covered(), start
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(tokens_TD), generator=random).split(BATCH):
            target = true_TP[batch]
            target = target / target.max().clamp(min=1e-30)
            predicted = scores("mlp", tokens_TD[batch], **_as_arguments(parameters))
            loss = F.binary_cross_entropy_with_logits(predicted, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = covered()
        if now > best:
            best = now
            kept_parameters = {name: p.detach().clone() for name, p in parameters.items()}
    return kept_parameters


def _as_arguments(parameters):
    names = {"router_in": "router_in_PD", "router_out": "router_out_PP"}
    return {names[name]: value for name, value in parameters.items()}
