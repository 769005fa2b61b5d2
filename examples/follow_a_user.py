"""Follow one user in Python: recommend, let them choose, recommend again without reading the history twice.

python examples/follow_a_user.py runs/demo/sft 50 181 172
"""

from __future__ import annotations

import sys

from reasonrec.recipes.recommender import Recommender


def main(folder: str, history: list[str], clicks: int = 3) -> None:
    """Start from raw item ids, oldest first, and take the best recommendation `clicks` times."""
    recommender = Recommender.from_pretrained(folder)
    titles = recommender.policy.catalogue.titles
    user = recommender.items.history(history)
    latest = int(user.shown[-1])

    # The prompt shows five items; what came before them is masked all the same.
    session = recommender.session(user.last(5), num_beams=20, repeats=False)
    for _ in range(clicks):
        found = session.search(k=10)
        best, score = int(found.items[0, 0]), float(found.scores[0, 0])
        print(f"after {titles[latest]!r}: {titles[best]!r} (log-probability {score:.2f})")
        latest = best
        session.append(best)  # reads one item; the rest of the history is in the cache


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
