"""An adapter merged into its base: one checkpoint, which plain transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reasonrec.recipes.models.merged import merge_adapter
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.policies.loading import load_trained, save_checkpoint
from reasonrec.tokenizers.terminal import say


def merge(
    source: Path, folder: Path, *, base_model: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write the merged model and all that belongs to it.

    Args:
        source: Folder of the adapter.
        folder: Where to write.
        base_model: Where its base is now; where the training found it by default.
        trust_remote_code: Run code that comes with the base.

    Returns:
        The facts for the manifest.
    """
    # On the CPU: float32 needs most memory, and nothing is computed but one sum.
    trained = load_trained(
        source, base_model=base_model, precision=choose("fp32", "cpu"), trust_remote_code=trust_remote_code
    )
    model = merge_adapter(trained.model)
    model.float()
    model.config._name_or_path = ""  # of this machine
    model.save_pretrained(folder, safe_serialization=True)
    say(f"merged: {sum(p.numel() for p in model.parameters()):,} weights in float32")
    return save_checkpoint(folder, trained.setting, trained.policy)
