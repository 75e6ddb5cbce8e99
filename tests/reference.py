"""The stratified block written down once more, token by token, with nothing clever in it.

It shares no code with the package: plain loops over tokens and experts, in the words of the
paper's section 3 (``norm="paper"``) or of the authors' code (``norm="released"``).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class ReferenceOutput:
    y: torch.Tensor
    balance_loss: torch.Tensor
    passes: list


def reference_block(
    params, strata, x, *, top_k=2, capacity_factor=None, norm="paper", padding=None
):
    """Run a block on ``x`` (tokens, dim).

    ``params`` maps the block's state-dict names to tensors. ``capacity_factor`` None means that
    nothing is dropped; ``padding`` holds one bool per token.
    """
    num_experts, num_strata = sum(strata), len(strata)
    stratum_of = [i for i, size in enumerate(strata) for _ in range(size)]
    start_of = [sum(strata[:i]) for i in range(num_strata)]
    is_real = [not padding[t] if padding is not None else True for t in range(len(x))]

    def layer_norm(i, v):
        return F.layer_norm(v, v.shape, params[f"norms.{i}.weight"], params[f"norms.{i}.bias"])

    def expert(e, v):
        hidden = torch.relu(v @ params["experts.fc1_weight"][e] + params["experts.fc1_bias"][e])
        return hidden @ params["experts.fc2_weight"][e] + params["experts.fc2_bias"][e]

    state = [x[t] for t in range(len(x))]
    stands_at = [0 if real else num_strata for real in is_real]
    passes = [0] * len(x)
    losses, saw_tokens = [], 0

    for i in range(num_strata):
        here = [t for t in range(len(x)) if stands_at[t] == i]
        visible = list(range(start_of[i], num_experts))
        if not here:
            losses.append(x.new_zeros(()))
            continue
        saw_tokens += 1
        normed = {t: layer_norm(i, state[t]) for t in here}
        probs = {t: F.softmax(params[f"gates.{i}.weight"] @ normed[t], dim=0) for t in here}

        choices = {}
        for t in here:
            ranked = sorted(range(len(visible)), key=lambda e: -probs[t][e].item())
            choices[t] = ranked[:top_k]

        queues = {e: [] for e in range(len(visible))}
        for k in range(top_k):
            for t in here:
                if k < len(choices[t]):
                    queues[choices[t][k]].append((t, k))
        limit = math.inf
        if capacity_factor is not None:
            limit = int(capacity_factor * math.ceil(len(here) / len(visible)))
        kept = {pair for queue in queues.values() for pair in queue[: min(limit, len(queue))]}

        for t in here:
            found = [e for k, e in enumerate(choices[t]) if (t, k) in kept]
            weights = [probs[t][e] for e in found]
            if len(choices[t]) > 1 and weights:
                total = sum(weights)
                weights = [w / total for w in weights]
            update = x.new_zeros(x.shape[1])
            for w, e in zip(weights, found):
                update = update + w * expert(visible[e], normed[t])
            if "pass_scale" in params:
                update = params["pass_scale"][i] * update
            residual = normed[t] if norm == "released" and i > 0 else state[t]
            state[t] = residual + update
            passes[t] += 1
            stands_at[t] = stratum_of[visible[choices[t][0]]] + 1

        loss = x.new_zeros(())
        for e in range(len(visible)):
            fraction = sum(choices[t][0] == e for t in here) / len(here)
            mean_probability = sum(probs[t][e] for t in here) / len(here)
            loss = loss + fraction * mean_probability
        losses.append(len(visible) * loss)

    if norm == "released":
        state = [layer_norm(num_strata, v) for v in state]
        mean_over = max(saw_tokens, 1)
    else:
        mean_over = num_strata
    return ReferenceOutput(torch.stack(state), sum(losses) / mean_over, passes)
