"""One importance ratio for a whole completion: the product of its tokens' (`importance_sampling_level: product`).

REG4Rec (arXiv 2508.15308, equation 9), with ρ = π(y)/π_old(y) of a completion y and its advantage A:

    J = mean of min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) − β KL(π, π_ref)

TRL has a ratio for each token (`token`, GRPO's) and their geometric mean (`sequence`, GSPO's, arXiv 2507.18071). The
product is not divided by the length: n tokens that each moved by 5% make a ratio of 1.05^n, so with the same ε it
clips long completions sooner. It is for answers of a few codes, not for chains. The divergence is that of the
completion, too: the sum over its tokens.

While a batch is what the policy wrote itself (one step of the optimiser a generation), each of these ratios is 1 and
nothing is clipped; what is left of the difference is how long and short completions weigh against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from trl import GRPOConfig

PRODUCT = "product"
# Keys of TRL's losses that this one does not read, with the values that they have when they are left alone.
_NOT_READ = {
    "loss_type": "dapo", "delta": None, "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0, "use_adaptive_entropy": False,
}  # fmt: skip


def check_ratio(arguments: GRPOConfig) -> None:
    """Refuse keys that the loss with a product of ratios does not read.

    Raises:
        UserError: If one is set.
    """
    if arguments.importance_sampling_level != PRODUCT:
        return
    for name, left_alone in _NOT_READ.items():
        if (value := getattr(arguments, name)) != left_alone:
            raise UserError(
                f"{name}={value} is not read with importance_sampling_level={PRODUCT}, which has a loss of its own: "
                "leave it out, or choose token or sequence"
            )


def product_ratio(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """ρ of each completion.

    Args:
        log_probs: (rows, tokens) under the policy.
        old: (rows, tokens) under the one that wrote them.
        mask: (rows, tokens) 1 for tokens that were chosen.

    Returns:
        (rows,).
    """
    return ((log_probs - old) * mask).sum(1).exp()


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(ρ A, clip(ρ, 1 − low, 1 + high) A), all (rows,)."""
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


class SequenceRatio(GRPOTrainer):
    """To be put in front of GRPOTrainer: replaces its loss where the ratio is the product, and nothing else."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.importance_sampling_level != PRODUCT:
            return super()._compute_loss(model, inputs)
        advantage, mask = inputs["advantages"], inputs["completion_mask"]
        if advantage.dim() != 1:
            raise UserError(
                f"importance_sampling_level={PRODUCT} has one ratio for a chain and its answer, which this algorithm "
                "gives different advantages: choose token, or another algorithm"
            )
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        log_probs, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.shape[1],
            compute_entropy=True,
        )
        ratio = product_ratio(log_probs, inputs.get("old_per_token_logps", log_probs.detach()), mask)
        loss = -clipped(ratio, advantage, self.epsilon_low, self.epsilon_high)
        logged = {"entropy": entropy}
        if self.beta:
            distance = inputs["ref_per_token_logps"] - log_probs
            kl = distance.exp() - distance - 1
            if self.args.use_bias_correction_kl:  # an estimate under π, from completions of π_old
                kl = kl * ratio[:, None]
            loss = loss + self.beta * (kl * mask).sum(1)
            logged["kl"] = kl
        self._log_loss(ratio.detach(), advantage, mask, logged)
        return loss.mean() / self.current_gradient_accumulation_steps

    def _log_loss(self, ratio: Tensor, advantage: Tensor, mask: Tensor, tokens: dict[str, Tensor]) -> None:
        """What TRL logs of a loss, under its names: means over tokens, and which completions were clipped."""
        metrics = self._metrics["train"]
        for name, values in tokens.items():
            sums = torch.stack([(values.detach() * mask).sum(), mask.sum().float()])
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
            metrics[name].append(total / max(count, 1.0))
        low = (ratio < 1 - self.epsilon_low) & (advantage < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantage > 0)
        shares = {"low": low, "high": high, "region": low | high}
        every = {name: self.accelerator.gather(value.float()) for name, value in shares.items()}
        for name, value in every.items():
            metrics[f"clip_ratio/{name}_mean"].append(value.mean().item())
        metrics["clip_ratio/low_min"].append(every["low"].min().item())
        metrics["clip_ratio/high_max"].append(every["high"].max().item())
