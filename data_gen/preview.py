"""A dataset on a terminal before it is written: the counts, what was dropped and why, and its first rows."""

from __future__ import annotations

from collections.abc import Sequence

from reasonrec.data_gen.schema import ITEM_TEXT, Tables, check_tables, describe, pieces
from reasonrec.tokenizers.terminal import visible

ROWS = 3  # of each table
_LAST = 4  # items of a sequence that are shown
_CHARS = 300


def preview(tables: Tables) -> str:
    """What a person looks at first, as text of several lines.

    Args:
        tables: The dataset.

    Example lines of a test row: `u17: …, Heat (1995), Clue (1985) -> Big (1988)`.
    """
    found, facts = check_tables(tables)
    frames = {name: next(iter(pieces(table))) for name, table in found.items()}
    titles = frames["items"]["title"].to_list()
    users = dict(frames["users"].select("user", "user_id").iter_rows())

    def sequence(items: Sequence[int]) -> str:
        start = ["…"] if len(items) > _LAST else []
        return ", ".join([*start, *(titles[item] for item in items[-_LAST:])])

    lines = ["items"]
    for item_id, *texts in frames["items"].select("item_id", *ITEM_TEXT).head(ROWS).iter_rows():
        lines.append(f"  {item_id}: {' | '.join(text for text in texts if text)}")
    lines.append("train, oldest first")
    lines += [
        f"  {users[u]}: {sequence(items)}" for u, items in frames["train"].select("user", "items").head(ROWS).rows()
    ]
    for name in ("valid", "test"):
        lines.append(f"{name}, a history -> its target")
        rows = frames[name].select("user", "history", "target").head(ROWS).rows()
        lines += [f"  {users[u]}: {sequence(items)} -> {titles[target]}" for u, items, target in rows]
    shown = "\n".join(f"  {visible(line, _CHARS)}" for line in lines)
    return f"{describe(facts)}\n{shown}\nnothing was written (preview: true)"
