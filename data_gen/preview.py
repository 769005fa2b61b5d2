"""A dataset on a terminal before it is written: the counts, what was dropped and why, and its first rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reasonrec.data_gen.schema import ITEM_TEXT, Tables, check_tables, pieces
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


def describe(facts: Mapping[str, Any]) -> str:
    """The counts that a person checks first, as a small table."""
    lines = [("data", facts["name"])]
    for table in facts.get("read", ()):
        lines += _describe_read(table)
    lines += [("users", f"{facts['n_users']:,}"), ("items", f"{facts['n_items']:,}")]
    lines.append(("train", f"{facts['n_train_sequences']:,} sequences, {facts['n_train_targets']:,} targets"))
    lines.append(("valid, test", f"{facts['n_valid']:,}, {facts['n_test']:,} rows ({facts['split']})"))
    lines.append(("history masked", "yes" if facts["mask_history"] else "no"))
    for step in facts["filters"]:
        lines.append((f"filter {step['step']}", _removed(step)))
    if ties := facts.get("ties"):
        share = f"{ties['interactions']:,} of {ties['of']:,} interactions share their user's time stamp"
        lines.append(("same time stamp", share + (f"; {ties['order']}" if ties["interactions"] else "")))
    if facts.get("terms"):
        lines.append(("terms", facts["terms"]))
    lines += [("note", note) for note in facts["notes"]]
    return "\n".join(f"  {visible(label):<28} {visible(str(value), 300)}" for label, value in lines)


def _describe_read(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What became of the rows of a file."""
    counted = f"{table['rows']:,} rows, {table['kept']:,} kept"
    counted += "".join(f", {count:,} {reason}" for reason, count in table["dropped"].items() if count)
    if table["blank_lines"]:
        counted += f"; {table['blank_lines']:,} blank lines"
    lines = [(f"{table['table']} read", counted)]
    if table.get("timestamps"):
        lines.append(("timestamps read as", table["timestamps"]))
    for name, count in table["ids_written_as_floats"].items():
        lines.append(("note", f"{count:,} of {table['table']}.{name} are written as floats; 7.0 is read as 7"))
    return lines


def _removed(step: Mapping[str, Any]) -> str:
    removed = f"{step['rows_before'] - step['rows_after']:,} of {step['rows_before']:,} interactions removed"
    return removed + (f", {step['missing']:,} of them without a rating" if step.get("missing") else "")
