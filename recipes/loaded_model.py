"""How a stage loads the model that it asks: the keys that say so, and the loading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reasonrec.recipes.keys import PRECISION_HELP, TRUST_HELP, PrecisionName
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.terminal import say

if TYPE_CHECKING:
    from reasonrec.recipes.recommender import Recommender


@dataclass(kw_only=True)
class LoadedModel:
    """The keys of a stage that loads a trained model."""

    base_model: str | None = field(
        default=None,
        metadata={"help": "an adapter's base model (Hub id or folder), if it moved since the training", "path": True},
    )
    precision: PrecisionName = field(default="auto", metadata={"help": PRECISION_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    device: str | None = field(default=None, metadata={"help": "device; the accelerator if there is one"})

    def load(self, model: str, **how: Any) -> Recommender:
        """Load a recommender, and say what it computes in.

        Args:
            model: Folder, or repository on the Hub.
            **how: What else `Recommender.from_pretrained` takes.

        Raises:
            UserError: As that does.
        """
        from reasonrec.recipes.recommender import Recommender

        recommender = Recommender.from_pretrained(
            model,
            base_model=self.base_model,
            dtype=self.precision,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            **how,
        )
        if is_first_process():
            say(recommender.precision)
        return recommender


@dataclass(kw_only=True)
class AskedModel(LoadedModel):
    """The keys of a stage that recommends to whoever asks."""

    model: str = field(
        metadata={"help": "folder of the trained model (sft.py), or user/name on the Hub", "path": True}
    )
    without: list[str] = field(
        default_factory=list, metadata={"help": "experts of the checkpoint (fuse.py) that are not to be heard"}
    )
    catalogue: str | None = field(
        default=None,
        metadata={"help": "a later version of the model's catalogue (grow_catalogue.py)", "path": True},
    )

    def recommender(self) -> Recommender:
        """Load it.

        Raises:
            UserError: As `load`.
        """
        return self.load(self.model, without=self.without, catalogue=self.catalogue)
