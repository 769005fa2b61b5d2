import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.interaction_log import InteractionLog, LogOptions, build_tables
from reasonrec.data_gen.preview import preview


def test_the_last_items_of_long_sequences_on_one_line_each() -> None:
    log = pl.DataFrame({"user_id": "\x1b[31mann", "item_id": [f"i{n}" for n in range(9)], "timestamp": range(9)})
    items = pl.DataFrame({"item_id": log["item_id"], "title": [f"T{n}" for n in range(9)], "brand": "Oak"})
    shown = preview(build_tables(InteractionLog("shop", log, clean_items(items, 0), "items"), LogOptions()))
    lines = shown.splitlines()
    assert "    i0: T0 | Oak" in lines
    assert r"    \x1b[31mann: …, T3, T4, T5, T6" in lines
    assert r"    \x1b[31mann: …, T4, T5, T6, T7 -> T8" in lines
    assert "\x1b" not in shown
