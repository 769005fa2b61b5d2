"""Whether thinking is worth its tokens, as a checkpoint carries it: measured by `recipes/judge_reasoning.py`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from reasonrec.recipes.keys import fit
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.manifest import Manifest

FACT = "reasoning"  # of a manifest
NDCG_MARGIN = 0.005  # so much NDCG@10 may be lost at most
UNMEASURED = "whether thinking helps was not measured on this checkpoint (recipes/judge_reasoning.py)"


@dataclass(frozen=True)
class Verdict:
    """What thinking did for validation users that no training looked at.

    Attributes:
        gain: Mean log-probability of the target behind the checkpoint's own chains, minus that under a checkpoint
            without chains; in nats, among the items that are not masked.
        gain_low: One-sided lower 95% bound of it.
        ndcg: NDCG@10 behind the chains, minus that of the checkpoint without.
        ndcg_low: One-sided lower 95% bound of it.
        cases: Validation cases.
        chains: Chains of each case.
        max_chain: Longest chain in tokens.
        tokens: Tokens that each of the two was trained on, the one that thinks first.
        direct: Content hash of the checkpoint without chains.
    """

    gain: float
    gain_low: float
    ndcg: float
    ndcg_low: float
    cases: int
    chains: int
    max_chain: int
    tokens: list[int]
    direct: str

    @property
    def offered(self) -> bool:
        """Whether the checkpoint thinks when it is asked to."""
        return self.gain_low > 0 and self.ndcg_low > -NDCG_MARGIN

    def __str__(self) -> str:
        """The reasons, for people."""
        return (
            f"thinking {'pays' if self.offered else 'does not pay'} on {self.cases} validation cases: "
            f"{self.gain:+.3f} nats (at least {self.gain_low:+.3f}; above 0 is asked for), "
            f"{self.ndcg:+.4f} NDCG@10 (at least {self.ndcg_low:+.4f}; above {-NDCG_MARGIN} is asked for)"
        )

    def facts(self) -> dict[str, Any]:
        """The same for a manifest."""
        return {FACT: asdict(self)}

    @classmethod
    def stored(cls, manifest: Manifest) -> Verdict | None:
        """What a checkpoint carries, if it was judged.

        Raises:
            UserError: If it is not what this kit writes.
        """
        found = manifest.facts.get(FACT)
        if found is None:
            return None
        kinds = get_type_hints(cls)
        try:
            return cls(**{item.name: fit(kinds[item.name], found[item.name]) for item in fields(cls)})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"what this {manifest.kind} says of its reasoning is not what this kit writes: judge it again with "
                "recipes/judge_reasoning.py"
            ) from error
