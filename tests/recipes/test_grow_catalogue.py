"""Items that come after a training: the stage, and what trained models make of its result."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes import grow_catalogue, index_items
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import EMBEDDINGS_FILE, ItemIndex, load_embeddings, load_quantizer

LAMPS = [
    {"item_id": f"new-{n}", "title": f"{kind} lamp", "category": "lamps"} for n, kind in enumerate(("oak", "glass"))
]


@pytest.fixture(scope="module")
def indexed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of real text vectors and company."""
    out = tmp_path_factory.mktemp("grow") / "index"
    with pytest.MonkeyPatch.context() as patch:
        words = ["--dataset", str(tiny_dataset), "--output_dir", str(out), "--codebook_sizes", "4", "6"]
        patch.setattr(sys, "argv", ["index_items.py", *words, "--collaboration", "2"])
        index_items.main()
    return out


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """A function that runs the stage on some new items."""

    def run(index: Path, name: str, items: list[dict[str, str]] | None = None, *words: str) -> Path:
        if items is not None:
            pl.DataFrame(items).write_csv(tmp_path / "new.csv")
            words = (*words, "--add_items", str(tmp_path / "new.csv"))
        argv = ["grow_catalogue.py", "--index", str(index), "--output_dir", str(tmp_path / name), *words]
        monkeypatch.setattr(sys, "argv", argv)
        grow_catalogue.main()
        return tmp_path / name

    return run


def test_new_items_stand_behind_the_old_ones(
    indexed: Path, tiny_dataset: Path, grow: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = Dataset.load(tiny_dataset).catalogue(ItemIndex.load(indexed))
    known = {"item_id": old.item_ids[0], "title": "another title", "category": ""}
    out = grow(indexed, "grown", [known, *LAMPS])
    said = capsys.readouterr().out
    assert "1 of 3 items are in the catalogue already and stay as they are" in said
    assert f"{out} holds {old.n_items + 2:,} items, 0 of them retired" in said
    manifest = read_manifest(out, "catalogue")
    assert manifest.inputs == {"dataset": old.dataset, "parent": read_manifest(indexed).hash}
    grown = Catalogue.load(out, manifest.facts)
    assert grown.items[: old.n_items].equals(old.items)
    assert grown.item_ids[old.n_items :] == ["new-0", "new-1"]
    assert (grown.codes.codes[: old.n_items] == old.codes.codes).all()
    assert old.grown_to(grown, "grown").trained == old.n_items
    # The vectors of texts in the space of company, so that later ones can be placed as these were.
    vectors = load_embeddings(out)
    assert vectors.shape == (old.n_items + 2, load_embeddings(indexed).shape[1])
    assert np.linalg.norm(vectors[-2:], axis=1) == pytest.approx(1, abs=1e-5)
    assert (out / EMBEDDINGS_FILE).samefile(indexed / EMBEDDINGS_FILE), "nothing of the index is copied"

    # It grows again, and shrinks, with an encoder that is found from where it lies.
    (tmp_path / "gone.txt").write_text(f"new-0\n\n  {old.item_ids[3]}\n")
    again = grow(out, "again", [{"item_id": "new-2", "title": "oak lamp", "category": "lamps"}],
                 "--retire", str(tmp_path / "gone.txt"))  # fmt: skip
    later = Catalogue.load(again, read_manifest(again).facts)
    assert later.retired.tolist() == [3, old.n_items]
    np.testing.assert_array_equal(load_embeddings(again)[:-1], vectors)
    assert later.codes.codes[-1, :2].tolist() == grown.codes.codes[old.n_items, :2].tolist()  # equal text, equal place
    assert old.grown_to(later, "later").trained == old.n_items
    assert "2 of them retired" in capsys.readouterr().out


def test_the_same_items_give_the_same_catalogue(indexed: Path, grow: Callable[..., Path]) -> None:
    first, second = (read_manifest(grow(indexed, name, LAMPS)) for name in ("one", "two"))
    assert first.files == second.files


@pytest.mark.parametrize(
    ("quantizer", "options", "unique"),
    [
        ("plain", "{}", "reassign"),
        ("product", "{}", "disambiguate"),
        ("product", "{}", "reassign"),
        ("rq_vae", "{steps: 20, latent: 8}", "disambiguate"),
        ("mixture", "{steps: 20, latent: 8}", "reassign"),
    ],
)
def test_codes_of_all_quantizers_grow(
    quantizer: str,
    options: str,
    unique: str,
    indexed: Path,
    tiny_dataset: Path,
    grow: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    words = ["--dataset", str(tiny_dataset), "--output_dir", str(tmp_path / "index"), "--codebook_sizes", "4", "48"]
    words += ["--quantizer", quantizer, "--quantizer_options", options, "--unique", unique]
    monkeypatch.setattr(sys, "argv", ["index_items.py", *words])
    index_items.main()
    old = ItemIndex.load(tmp_path / "index")
    out = grow(tmp_path / "index", "grown", LAMPS)
    grown = Catalogue.load(out, read_manifest(out).facts).codes
    assert grown.level_sizes == old.level_sizes, "no token is new"
    assert (grown.codes[:-2] == old.codes).all()
    if unique == "reassign":
        assert grown.level_sizes[-1] == 0
        assert (grown.codes[:, -1] == -1).all(), "codes alone tell new items apart, too"
    else:
        nearest = load_quantizer(out).encode(load_embeddings(out)[-2:])
        same = (grown.codes[-2:, :-1] == nearest).all(1)
        free = [not (old.codes[:, :-1] == codes).all(1).any() for codes in nearest]
        assert all(same[free]), "where the nearest codes are nobody's, they are taken"


def test_bad_input(indexed: Path, tiny_index: Path, refused_by: Callable[..., str], tmp_path: Path) -> None:
    pl.DataFrame([*LAMPS, LAMPS[0]]).write_csv(tmp_path / "twice.csv")
    (tmp_path / "gone.txt").write_text("nobody\n")
    words = {
        "nothing is to change: set add_items, retire, or both": (),
        "1 item ids stand in several rows, e.g. 'new-0' (2 times)": ("--add_items", str(tmp_path / "twice.csv")),
        "1 of 1 ids are not in the catalogue, the first is 'nobody'": ("--retire", str(tmp_path / "gone.txt")),
        "cannot be read (": ("--retire", str(tmp_path / "none.txt")),
    }
    for said, flags in words.items():
        assert said in refused_by("grow_catalogue", "--index", str(indexed), *flags)
    refused = refused_by("grow_catalogue", "--index", str(tiny_index), "--retire", str(tmp_path / "gone.txt"))
    assert "does not exist: an imported index has no embeddings" in refused


# -- trained models


def test_a_checkpoint_recommends_what_came_later(
    adapter: Path, tmp_path: Path, later_version: Callable[..., Path]
) -> None:
    before = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    own, history = before.policy.catalogue, ["new-1", *before.policy.catalogue.item_ids[:3]]
    folder = later_version(own, tmp_path / "later", new=4)
    after = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu", catalogue=folder)
    n = own.n_items + 4
    found = after.recommend(history, k=n, num_beams=n, repeats=False)
    assert {"new-0", "new-2", "new-3"} <= {item.id for item in found}
    assert "new-1" not in {item.id for item in found}  # what the user had is masked, whenever it came
    _, scores = after.rank([history], k=n, num_beams=n, repeats=True)
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-4)
    # The new ones take their probability from their neighbours in the trie and from nobody else.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the item that is unknown there
        old = {item.id: item.score for item in before.recommend(history[1:], k=own.n_items, num_beams=own.n_items)}
    new = {item.id: item.score for item in after.recommend(history[1:], k=n, num_beams=n)}
    assert all(new[item] <= old[item] + 1e-4 for item in old)
    untouched = [item for item in old if abs(new[item] - old[item]) < 1e-4]
    assert untouched, "prefixes that nothing joined give what they gave"


def test_what_is_retired_is_never_recommended_and_still_read(
    adapter: Path, tmp_path: Path, later_version: Callable[..., Path]
) -> None:
    before = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    own = before.policy.catalogue
    history = own.item_ids[:3]
    first = [item.id for item in before.recommend(history, k=5)]
    gone = [own.item_ids.index(item) for item in first[:2]]
    after = before.with_catalogue(later_version(own, tmp_path / "later", new=0, retired=gone))
    assert [item.id for item in after.recommend(history, k=3)] == first[2:]
    assert [item.id for item in after.recommend(history, k=3, exclude=[first[2:3]])][:2] == first[3:]
    assert not set(first[:2]) & {item.id for item in after.recommend(history, k=own.n_items, repeats=True)}
    assert not set(first[:2]) & {item.id for item in after.session(history).recommend(k=5)}
    assert len(after.recommend(first[:2], k=3)) == 3
    assert after.model is before.model


def test_a_catalogue_of_others_is_refused(
    adapter: Path, other_world: tuple[Path, Path], tmp_path: Path, later_version: Callable[..., Path]
) -> None:
    recommender = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    own = recommender.policy.catalogue
    foreign = Dataset.load(other_world[0]).catalogue(ItemIndex.load(other_world[1]))
    stranger = later_version(foreign, tmp_path / "stranger", new=0)
    with pytest.raises(UserError, match="stranger belongs to the dataset"):
        recommender.with_catalogue(stranger)
    swapped = replace(own, items=own.items.reverse())
    with pytest.raises(UserError, match="numbers the items in another order"):
        recommender.with_catalogue(later_version(swapped, tmp_path / "swapped", new=1))
    with pytest.raises(UserError, match="is of kind 'adapter', needed is 'catalogue'"):
        recommender.with_catalogue(adapter)
