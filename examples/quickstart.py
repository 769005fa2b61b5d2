"""Load a trained recommender and ask it, by the raw ids of your tables.

python examples/quickstart.py runs/demo/published 50 181 172
python examples/quickstart.py user/name 50 181 172        # from the Hub
"""

from __future__ import annotations

import sys

from reasonrec.recipes.recommender import Recommender


def main(model: str, history: list[str]) -> None:
    recommender = Recommender.from_pretrained(model)
    for rank, item in enumerate(recommender.recommend(history, k=5), start=1):
        print(f"{rank:>3}  {item.title}  ({item.id}, log-probability {item.score:.2f})")

    # Several users at once, as arrays: (users, k), None and -inf where fewer items are allowed.
    found = recommender.recommend([history, history[:1]], k=5, arrays=True)
    print("two users:", found.ids.tolist())

    # The same items that `recommend` would mask may come again, and others must not.
    again = recommender.recommend(history, k=5, repeats=True, exclude=[found.ids[0, :1].tolist()])
    print("with repeats, without the first:", [item.id for item in again])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
