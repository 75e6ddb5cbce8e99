"""The block on a device, compared with itself in float64 on the CPU."""

from dataclasses import dataclass

import torch

from fairseq_smoe.moe.block import SMoEBlock

# largest deviation that rounding explains, as norm of the difference relative to the norm. The few
# hidden units that rounding moves across ReLU's 0 are within it
ROUNDING = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
REROUTED = {torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 1e-3}  # share of tokens
ON_EDGE = 0.25  # relative change of what experts add to a token that another expert explains


@dataclass(frozen=True)
class BlockCheck:
    """A block in training, forward and backward, compared with float64.

    Attributes:
        strata: experts of each stratum.
        tokens: number of real tokens.
        padding: number of padding tokens, at the end.
        embed_dim, ffn_dim: widths.
        device: e.g. "cuda".
        dtype: of weights and tokens.
        backend: of the experts.
        capacity_factor: None, so that no token is dropped, or a number, for float32 only: in half
            precision a few tokens choose other experts, which would drop others in turn.
    """

    strata: tuple
    tokens: int
    device: str
    dtype: torch.dtype
    backend: str = "auto"
    padding: int = 0
    embed_dim: int = 64
    ffn_dim: int = 128
    capacity_factor: float | None = None
    seed: int = 1

    def deviations(self):
        """Compute the block twice.

        Returns:
            ``{what: deviation}`` of output, balance loss and all gradients: norm of the difference
            relative to the norm. The gates have one for all, and so have the norms: only few
            tokens may reach a later one. "passes" is the number of tokens with other passes.
        """
        block, tokens_TD = self._block(), self._tokens()
        mask = torch.arange(len(tokens_TD)) >= self.tokens
        reference = self._like(block, "loop").double()
        expected = step(reference, tokens_TD.double(), mask)
        ours = self._like(block, self.backend).to(self.device)
        found = step(ours, tokens_TD.to(self.device), mask.to(self.device))
        passes = found.pop("passes").cpu() != expected.pop("passes")
        deviations = {name: _deviation(found[name], value) for name, value in expected.items()}
        return {"passes": int(passes.sum()), **deviations}

    def failures(self):
        """The deviations that rounding does not explain."""
        most = {"passes": REROUTED[self.dtype] * self.tokens}
        return {
            name: value
            for name, value in self.deviations().items()
            if not value <= most.get(name, ROUNDING[self.dtype])  # NaN is a failure, too
        }

    def _block(self):
        """A block whose weights are numbers of ``dtype``."""
        torch.manual_seed(self.seed)
        return self._make("loop").to(self.dtype)

    def _make(self, backend):
        return SMoEBlock(
            self.embed_dim,
            self.ffn_dim,
            self.strata,
            capacity_factor=self.capacity_factor,
            expert_backend=backend,
        )

    def _like(self, block, backend):
        other = self._make(backend).to(self.dtype)
        other.load_state_dict(block.state_dict())
        return other.train()

    def _tokens(self):
        """(T, D) tokens of ``dtype``, padding last. None of them is on an edge between two experts,
        where rounding decides which one it visits."""
        reference = self._like(self._block(), "loop").double()
        reference.capacity_factor = None
        found_TD = torch.empty(0, self.embed_dim, dtype=self.dtype)
        noise = 8 * torch.finfo(self.dtype).eps
        with torch.no_grad():
            while len(found_TD) < self.tokens:
                tokens_TD = torch.randn(2 * self.tokens + 8, self.embed_dim).to(self.dtype)
                plain_TD = _update(reference, tokens_TD.double())
                settled_T = torch.ones(len(tokens_TD), dtype=torch.bool)
                for _ in range(6):
                    moved_TD = tokens_TD.double()
                    moved_TD = _update(reference, moved_TD + noise * torch.randn_like(moved_TD))
                    change_T = (moved_TD - plain_TD).norm(dim=1) / plain_TD.norm(dim=1)
                    settled_T &= change_T < ON_EDGE
                found_TD = torch.cat([found_TD, tokens_TD[settled_T]])
        padding = torch.zeros(self.padding, self.embed_dim, dtype=self.dtype)
        return torch.cat([found_TD[: self.tokens], padding])


def step(block, tokens_TD, mask):
    """Output, passes, balance loss and all gradients of a step in training."""
    tokens_TD = tokens_TD.detach().clone().requires_grad_()
    y_TD, stats = block(tokens_TD, mask)
    # gradients that float16 can hold, and that the balance loss, which jumps where the two best
    # experts of a token change places, has as small a part in as in a training
    (y_TD.double().square().sum() / y_TD.shape[1] + 0.01 * stats.balance_loss.double()).backward()
    gradients = {"tokens": [tokens_TD.grad]}
    for name, parameter in block.named_parameters():
        kind = name if name.startswith("experts.") else name.partition(".")[0]
        gradients.setdefault(kind, []).append(parameter.grad)
    return {
        "passes": stats.passes,
        "output": y_TD.detach(),
        "balance loss": stats.balance_loss.detach(),
        **{
            f"gradient of {kind}": torch.cat([gradient.flatten() for gradient in own])
            for kind, own in gradients.items()
        },
    }


def _update(block, tokens_TD):
    """What the experts add to each token."""
    return block(tokens_TD)[0] - tokens_TD


def _deviation(found, expected):
    found = found.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))
