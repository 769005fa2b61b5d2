"""The catalogue: what a checkpoint knows of items, without any interaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import build_index

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def catalogue_of(titles: list[str], **more: Any) -> Catalogue:
    columns = {name: ["" for _ in titles] for name in SCHEMA} | {"title": titles, "train_count": [0] * len(titles)}
    items = pl.DataFrame(columns | {"item_id": [str(n) for n in range(len(titles))]}, schema=SCHEMA)
    return Catalogue(items, "things", True, "d" * 64, {"n_users": 3}, **more)


@given(st.lists(TEXT, min_size=1, max_size=9), st.booleans())
def test_it_comes_back_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str], coded: bool
) -> None:
    codes = build_index(np.arange(len(titles))[:, None] % 3, [3]) if coded else None
    right, folder = catalogue_of(titles, index=codes), tmp_path_factory.mktemp("catalogue")
    found = Catalogue.load(folder, right.save(folder))
    assert found.titles == titles
    assert found.items.equals(right.items)
    assert (found.name, found.mask_history, found.dataset, found.facts) == ("things", True, "d" * 64, {"n_users": 3})
    if codes is None:
        with pytest.raises(UserError, match="has no codes: index the items"):
            _ = found.codes
    else:
        assert found.codes.tuples() == codes.tuples()


def test_texts_leave_out_what_is_empty() -> None:
    items = catalogue_of(["lamp", "tent"]).items.with_columns(category=pl.Series(["home", ""]), brand=pl.lit("B"))
    found = Catalogue(items, "things", False, "")
    assert found.texts("title", "category", "brand") == ["lamp. home. B", "tent. B"]
    assert found.texts("category", "brand", joined=" ") == ["home B", "B"]


def test_categories_are_numbered() -> None:
    categories = pl.Series(["w", "", "a", "w > b"])
    items = catalogue_of(["lamp", "tent", "kit", "saw"]).items.with_columns(category=categories)
    assert Catalogue(items, "things", False, "").categories.tolist() == [1, -1, 0, 1]
    assert Catalogue(items.filter(pl.col("category") != ""), "", False, "").categories.tolist() == [1, 0, 1]
    assert catalogue_of(["lamp", "tent"]).categories.tolist() == [-1, -1]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    facts = catalogue_of(["lamp"]).save(tmp_path)
    (tmp_path / "catalogue.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(UserError, match=r"catalogue\.parquet cannot be read"):
        Catalogue.load(tmp_path, facts)
