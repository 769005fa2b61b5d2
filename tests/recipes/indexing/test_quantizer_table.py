"""The table of quantizers: one command, the same embeddings for all, nothing chosen by a test row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.schema import ROWS, Tables, write_dataset
from reasonrec.recipes import index_items
from reasonrec.recipes.indexing import item_vectors
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.errors import UserError

ITEMS, USERS = 24, 20


def make_dataset(folder: Path, *, held_out: bool = True) -> Path:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, ITEMS, 6).tolist() for _ in range(USERS)]
    rows = pl.DataFrame({
        "row": range(USERS), "user": range(USERS), "history": histories,
        "target": [user % 3 for user in range(USERS)], "masked": [[]] * USERS, "same_time": [False] * USERS,
    }, schema=ROWS)  # fmt: skip
    rows = rows if held_out else rows.clear()
    tables = Tables(
        items=pl.DataFrame({
            "item": range(ITEMS), "item_id": [f"i{i}" for i in range(ITEMS)], "title": [f"t{i}" for i in range(ITEMS)],
            "description": [""] * ITEMS, "category": [f"c{i % 4}" for i in range(ITEMS)], "brand": [""] * ITEMS,
        }),
        users=pl.DataFrame({"user": range(USERS), "user_id": [f"u{u}" for u in range(USERS)]}),
        train=pl.DataFrame({"user": range(USERS), "items": histories, "first_target": [0] * USERS}),
        valid=rows,
        test=rows,
        facts={
            "name": "toy", "split": "leave_one_out", "mask_history": False, "order": "sequence",
            "repeats": False, "filters": [], "notes": [],
        },
    )  # fmt: skip
    with staged(folder, kind="dataset", config={}) as (partial, facts):
        facts.update(write_dataset(partial, tables))
    return folder


def embeddings(fields: dict[str, list[str]], *_: Any, **__: Any) -> np.ndarray:
    """Items 0 and 1 are the same thing, the others are not."""
    points = np.random.default_rng(0).normal(size=(len(fields["title"]), 6)).astype(np.float32)
    points[1] = points[0]
    return points


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(item_vectors, "embed_items", embeddings)

    def run(*flags: str, held_out: bool = True, sizes: tuple[str, str] = ("3", "24")) -> list[dict[str, Any]]:
        dataset = make_dataset(tmp_path / f"dataset{held_out}", held_out=held_out)
        out = ["--dataset", str(dataset), "--output_dir", str(tmp_path / "table"), "--codebook_sizes", *sizes]
        monkeypatch.setattr(sys, "argv", ["index_items.py", *out, *flags])
        index_items.main()
        found: list[dict[str, Any]] = json.loads((tmp_path / "table" / "quantizers.json").read_text())["rows"]
        return found

    return run


def test_one_table_for_all(table: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--quantizer", "rq_vae", "--quantizer_options", "{steps: 5}")
    rows = table("--compare", "plain", "product", "rq_vae", *options)
    ways = ["disambiguate", "reassign"]
    assert [(row["quantizer"], row["unique"]) for row in rows] == [
        (name, way) for name in ("plain", "product", "rq_vae") for way in ways
    ]
    for one, dealt in zip(rows[::2], rows[1::2], strict=True):
        # Two items are equal, and two thirds of the test targets are one of them or the third item.
        assert one["collisions"] >= 2 / ITEMS
        assert one["collisions_of_test_targets"] >= 13 / USERS
        assert one["tokens"] == pytest.approx(2 + one["collisions"])
        assert dealt["collisions"] == dealt["collisions_of_test_targets"] == 0
        assert dealt["tokens"] == 2
        assert dealt["reassigned"]["items"] >= 1
        assert dealt["seconds"] >= one["seconds"] > 0
        for row in (one, dealt):
            assert 0 < row["utilisation"] <= 1
            assert len(row["perplexity"]) == 2
            assert row["information"] >= 0
            assert row["nll"] > 0
            low, high = row["ci95"]
            assert low <= row["difference"] <= high
    assert rows[0]["difference"] == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("| ") for line in out.splitlines()) == 7
    assert "| rq_vae | reassign |" in out
    assert read_manifest(tmp_path / "table", "comparison").config["compare"] == ["plain", "product", "rq_vae"]
    assert not (tmp_path / "table" / "index.safetensors").exists()


def test_a_quantizer_whose_groups_are_too_large_has_one_row_and_a_reason(
    table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table("--compare", "plain", sizes=("3", "2"))
    assert [row["unique"] for row in rows] == ["disambiguate"]
    assert "plain: unique=reassign, but" in capsys.readouterr().out


def test_without_held_out_rows_there_is_no_loss(table: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (one, dealt) = table("--compare", "plain", held_out=False)
    for row in (one, dealt):
        assert row["nll"] is row["difference"] is row["ci95"] is row["collisions_of_test_targets"] is None
    assert "| - | - [-, -] |" in capsys.readouterr().out


def test_an_index_is_not_taken_for_a_table(table: Any, tmp_path: Path) -> None:
    table("--compare", "plain")
    with pytest.raises(UserError, match="comparison"):
        read_manifest(tmp_path / "table", "index")
