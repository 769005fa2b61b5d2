"""Whether reinforcement learning will find something to reward: what a model draws for validation cases."""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.tasks.choice import validation_sample
from reasonrec.recipes.decoding.sample import Sampler, noise, roll_out
from reasonrec.recipes.models.checkpoint import training_data
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.prefix import common_prefix
from reasonrec.tokenizers.artefact import read_manifest


def pass_at_k(right: NDArray[np.int64], n: int, k: int) -> float:
    """Share of cases in which one of k draws is right, without bias (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        right: How many of the n draws of each case were.
        n: Draws of each case.
        k: At most n.
    """
    return float(np.mean([1 - comb(n - c, k) / comb(n, k) for c in right.tolist()]))


def try_rollouts(model: str, dataset: str | None, prompts: int, rollouts: int, trust_remote_code: bool) -> str:
    """Draw items behind validation histories, directly, and say how often they are right.

    Args:
        model: Folder of the trained model.
        dataset: Its dataset, if it moved.
        prompts: Validation cases.
        rollouts: Draws for each.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: If the model or its dataset cannot be read, or there is no validation case.
    """
    data = training_data(read_manifest(model), model, dataset)
    rows = validation_sample(data, prompts, "history", "target")
    recommender = Recommender.from_pretrained(model, trust_remote_code=trust_remote_code)
    policy, target = recommender.policy, rows["target"].to_numpy()
    drawn = roll_out(
        recommender.model,
        policy.answers,
        recommender.prompts(rows["history"].to_list()),
        Sampler(rollouts),
        eos_ids=[policy.eos_id],
        pad_id=policy.pad_id,
        noise=noise(0, 0, np.arange(len(rows)), rollouts, policy.answers.longest),
    )
    items = drawn.items.reshape(len(rows), rollouts)
    right = (items == target[:, None]).sum(1)
    known = policy.catalogue.index
    codes = known.tuples() if known else [(item,) for item in range(policy.catalogue.n_items)]
    near = np.array([[common_prefix(codes[i], codes[t]) for i in own] for own, t in zip(items, target, strict=True)])
    mixed = float((near.std(1) > 0).mean())
    passes = ", ".join(f"pass@{k} {pass_at_k(right, rollouts, k):.3f}" for k in (1, 4, 8, 16, 64) if k <= rollouts)
    verdict = (
        "groups of that size have something to compare"
        if mixed >= 0.5
        else "most groups would teach nothing: train longer with sft.py, or raise num_generations"
    )
    return (
        f"\n{model}: {len(rows)} validation cases, {rollouts} draws each\n"
        f"    valid answers {float((items >= 0).mean()):.3f}, {passes}\n"
        f"    first code right {float((near > 0).mean()):.3f}; draws differ in how much is right in {mixed:.2f} of "
        f"the groups: {verdict}"
    )
