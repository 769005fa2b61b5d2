"""The README.md of a trained model: what it is, what it needs, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import PACKAGE
from reasonrec.tokenizers.terminal import visible

if TYPE_CHECKING:
    from reasonrec.recipes.policies.base import Policy
    from reasonrec.recipes.rankers.pool import Pool

TAGS = ("recommender-system", "reasonrec")
_CARD = """\
---
{front}---
# A generative recommender for {name}

{base} learned {n_items} items and how people use them ({method}, policy {policy}).

| | |
|---|---|
| items, users | {n_items}, {n_users} |
{more}| longest history | {max_history} items |
| prompt | {prompt} |
| dataset | `{dataset}…` |
| training loss | {loss:.3f} |

Load it with the kit, which checks that the base model is that of the training:

```python
from reasonrec.recipes.recommender import Recommender

recommender = Recommender.from_pretrained("path/to/this/folder")
items, scores = recommender.rank([[3, 14, 15]], k=10)
```

{plain}
"""

PLAIN_ADAPTER = """\
Or with plain PEFT, on the base model with {rows} embedding rows:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base}{layers})
base.resize_token_embeddings({rows})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


# Signs that mark something up wherever they stand, and those that do at the beginning of a paragraph.
_MARKUP = re.compile(r"[\\`*\[\]<>|~$&#:@]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)
_OPENING = re.compile(r"^(\d*)([-+=.)])")
_MAX_CHARS = 200


def as_text(text: str) -> str:
    """A text of others as Markdown that shows it: no link, no markup, no HTML, no cell of its own, on one line."""
    text = _MARKUP.sub(r"\\\g<0>", visible(" ".join(text.split()), _MAX_CHARS))
    return _OPENING.sub(r"\1\\\2", text)


def as_code(text: str) -> str:
    """A text as code in a cell of a Markdown table: its line breaks are written out, whatever it holds is shown."""
    text = visible(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if text[:1] in "` " or text[-1:] in "` " else ""
    return f"{fence}{room}{text}{room}{fence}".replace("|", "\\|")


_EXPERTS = """
## Experts

What the model says of items is pooled with what {names} say: with the kit, `recommend` hears them, and
`Recommender.from_pretrained(…, without=[…])` leaves some out. They know which items go together, and hold no
interaction and no user. Weights at each level of an answer, fitted on validation cases: {weights}.
"""


def add_experts(folder: Path, pool: Pool) -> None:
    """Say in a card which experts are heard.

    Args:
        folder: Folder of the card.
        pool: The experts and their weights.
    """
    path = folder / "README.md"
    text = _EXPERTS.format(names=", ".join(pool.experts), weights=pool)
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def write_card(folder: Path, setting: Setting, policy: Policy, metrics: Mapping[str, Any]) -> None:
    """Write the card.

    Args:
        folder: Where to.
        setting: What training and inference agree on.
        policy: How the model reads and answers.
        metrics: The trainer's final metrics.
    """
    is_hub_id = not setting.base_model.startswith(PACKAGE) and not Path(setting.base_model).exists()
    adapter = setting.method != "full"
    base = setting.base_model if is_hub_id else Path(setting.base_model.removeprefix(PACKAGE)).name
    front: dict[str, Any] = {"base_model": base} if is_hub_id else {}
    front |= {"library_name": "peft" if adapter else "transformers", "tags": [*TAGS, policy.name.replace("_", "-")]}
    card = _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=as_text(policy.catalogue.name),
        base=as_text(base),
        n_items=policy.catalogue.n_items,
        n_users=policy.catalogue.facts.get("n_users", "?"),
        method={"full": "full fine-tuning", "lora": "LoRA", "qlora": "LoRA on a 4-bit base"}[setting.method],
        policy=policy.name,
        more="".join(f"| {name} | {value} |\n" for name, value in policy.card().items()),
        max_history=setting.max_history,
        prompt=as_code(setting.history_prompt),
        dataset=policy.catalogue.dataset[:12],
        loss=metrics.get("train_loss", float("nan")),
        plain=PLAIN_ADAPTER.format(
            layers=f", num_hidden_layers={setting.layers}" if setting.layers else "",
            rows=policy.new_tokens[-1] + 1,
            base=json.dumps(base if is_hub_id else "path/to/the/base/model"),
        )
        if adapter and policy.new_tokens
        else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
