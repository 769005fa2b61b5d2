"""The README.md of a trained model: what it is, what it needs, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reasonrec.recipes.bundle import Bundle, Setting
from reasonrec.recipes.models.load import PACKAGE

_CARD = """\
---
{front}library_name: {library}
tags:
- recommender-system
- semantic-ids
- reasonrec
---
# A generative recommender for {name}

{base} learned {n_items} items as semantic IDs and how people use them ({method}).

| | |
|---|---|
| items, users | {n_items}, {n_users} |
| item codes | {sizes} |
| longest history | {max_history} items |
| prompt | `{prompt}` |
| index | `{index}…` |
| training loss | {loss:.3f} |

Load it with the kit, which checks that index and base model are those of the training:

```python
from reasonrec.recipes.recommender import Recommender

recommender = Recommender.load("path/to/this/folder")
items, scores = recommender.recommend([[3, 14, 15]], k=10)
```

{plain}
"""

_PLAIN_ADAPTER = """\
Or with plain PEFT, on the base model with {rows} embedding rows:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
base.resize_token_embeddings({rows})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def write_card(folder: Path, setting: Setting, bundle: Bundle, metrics: Mapping[str, Any]) -> None:
    """Write the card.

    Args:
        folder: Where to.
        setting: What training and inference agree on.
        bundle: Dataset, index and tokenizer.
        metrics: The trainer's final metrics.
    """
    is_hub_id = not setting.base_model.startswith(PACKAGE) and not Path(setting.base_model).exists()
    adapter = setting.method != "full"
    card = _CARD.format(
        front=f"base_model: {setting.base_model}\n" if is_hub_id else "",
        library="peft" if adapter else "transformers",
        name=bundle.dataset.facts.get("name", "a data set"),
        base=setting.base_model if is_hub_id else Path(setting.base_model.removeprefix(PACKAGE)).name,
        n_items=bundle.dataset.n_items,
        n_users=bundle.dataset.n_users,
        method={"full": "full fine-tuning", "lora": "LoRA", "qlora": "LoRA on a 4-bit base"}[setting.method],
        sizes=" × ".join(map(str, bundle.index.level_sizes[:-1]))
        + f", {bundle.index.level_sizes[-1]} to tell equal ones apart",
        max_history=setting.max_history,
        prompt=setting.history_prompt.replace("\n", "\\n"),
        index=(bundle.index.manifest.hash if bundle.index.manifest else "")[:12],
        loss=metrics.get("train_loss", float("nan")),
        plain=_PLAIN_ADAPTER.format(
            rows=bundle.vocabulary.size, base=setting.base_model if is_hub_id else "path/to/the/base/model"
        )
        if adapter
        else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
