"""Publish a trained recommender (here a dry run, which makes the folder only) and load it by raw ids.

python examples/publish_and_load.py runs/demo/sft runs/demo/to_publish 50 181 172

`dry_run=False` and `repository="you/my-recommender"` push it (after `hf auth login`); then it is
`Recommender.from_pretrained("you/my-recommender")` on any machine.
"""

from __future__ import annotations

import sys

from reasonrec.recipes.publish import PublishConfig, publish
from reasonrec.recipes.recommender import Recommender


def main(trained: str, folder: str, history: list[str], base_model: str | None = None) -> None:
    """Make the folder of a trained model, load that, and recommend to a user who had these items."""
    publish(PublishConfig(model=trained, output_dir=folder, base_model=base_model, dry_run=True))
    recommend(folder, history, base_model)


def recommend(folder: str, history: list[str], base_model: str | None = None) -> None:
    """Load a published folder, wherever it is, and recommend."""
    recommender = Recommender.from_pretrained(folder, base_model=base_model)
    for item in recommender.recommend(history, k=3):
        print(f"{item.title} (id {item.id}, log-probability {item.score:.2f})")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
