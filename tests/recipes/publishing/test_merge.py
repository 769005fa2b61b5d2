"""A merged adapter: one checkpoint for plain transformers, with the scores of the adapter on its base."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.decoding.prefix import padded
from reasonrec.recipes.publish import PublishConfig, publish
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.errors import UserError

ATOL = 1e-3  # of log-probabilities


@pytest.fixture(scope="module")
def in_4bit(stage, sft_flags: list[str], lora_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared adapter's training, on a base in 4 bit."""
    out = tmp_path_factory.mktemp("in_4bit") / "qlora"
    stage("sft", *sft_flags, *lora_flags, "--method", "qlora", "--output_dir", str(out))
    return out


@pytest.fixture(params=["lora", "qlora"])
def trained(request: pytest.FixtureRequest, adapter: Path) -> Path:
    return adapter if request.param == "lora" else request.getfixturevalue("in_4bit")


def merged_from(adapter: Path, out: Path) -> Path:
    assert publish(PublishConfig(str(adapter), str(out), merge=True, dry_run=True)) is None
    return out


def check_same(adapter: Path, merged: Path, dataset: Path) -> None:
    histories = Dataset.load(dataset).test["history"].to_list()
    ours, theirs = (Recommender.from_pretrained(path, dtype="fp32", device="cpu") for path in (adapter, merged))
    n = ours.policy.catalogue.n_items
    everything = np.tile(np.arange(n), (len(histories), 1))
    expected, found = (one.score(histories, everything) for one in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=ATOL)
    lists, others = (one.rank(histories, k=10, exhaustive=True)[0] for one in (ours, theirs))
    # Another item may stand in a place only where both are about as likely.
    at, instead = (np.take_along_axis(expected, items, axis=1) for items in (lists, others))
    np.testing.assert_allclose(instead, at, atol=2 * ATOL)


def test_it_is_the_adapter_on_its_base(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    merged = merged_from(trained, tmp_path / "merged")
    check_same(trained, merged, tiny_dataset)
    manifest = read_manifest(merged, "model")
    assert manifest.facts == read_manifest(trained).facts
    assert not {name for name in manifest.files if name.startswith("adapter")}
    assert "library_name: transformers" in (merged / "README.md").read_text()
    assert "quantization_config" not in (merged / "config.json").read_text()


def test_plain_transformers_loads_it(in_4bit: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = merged_from(in_4bit, tmp_path / "merged")
    model, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(model.parameters()).dtype == torch.float32
    ours = Recommender.from_pretrained(in_4bit, dtype="fp32", device="cpu")
    assert len(AutoTokenizer.from_pretrained(merged)) >= ours.policy.vocabulary.size
    ids, mask = padded(ours.prompts([[3, 14, 15]]), ours.policy.pad_id, ours.model.device)
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=ids, attention_mask=mask).logits for m in (model, ours.model))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_weights_that_are_still_4_bit_are_not_rounded_again(
    in_4bit: Path, tiny_dataset: Path, tmp_path: Path, expanded_at_every_step: None
) -> None:
    check_same(in_4bit, merged_from(in_4bit, tmp_path / "merged"), tiny_dataset)


def test_a_whole_model_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    merged = merged_from(adapter, tmp_path / "merged")
    with pytest.raises(UserError, match="is a whole model already"):
        merged_from(merged, tmp_path / "again")
    assert publish(PublishConfig(str(merged), str(tmp_path / "as it is"), dry_run=True)) is None


def test_quantization_is_as_trained_unless_told(in_4bit: Path, adapter: Path) -> None:
    """Scores are those of NF4 with `auto`, and others on whole weights, of which a warning tells."""
    from bitsandbytes.nn import Linear4bit

    from reasonrec.recipes.models import quantized

    history = [[3, 14, 15]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained on a base in 4 bit")
        auto = Recommender.from_pretrained(in_4bit, dtype="fp32", device="cpu")
        again = Recommender.from_pretrained(in_4bit, dtype="fp32", device="cpu", quantization="4bit")
    with pytest.warns(UserWarning, match="trained on a base in 4 bit and meets whole weights"):
        whole = Recommender.from_pretrained(in_4bit, dtype="fp32", device="cpu", quantization=None)
    scores = [one.score(history, [list(range(48))]) for one in (auto, again, whole)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert np.abs(scores[0] - scores[2]).max() > 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "free_memory", lambda: 0)
        packed = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu", quantization="4bit")
    assert any(isinstance(module, Linear4bit) for module in packed.model.modules())
    with pytest.raises(UserError, match="quantization='8bit' has to be auto, 4bit or None"):
        Recommender.from_pretrained(adapter, quantization="8bit")  # type: ignore[arg-type]


def test_experts_stay_with_a_merged_model(adapter: Path, stage, tmp_path: Path) -> None:
    words = ["--experts", "{co_visitation: {window: 3}}", "--precision", "fp32"]
    stage("fuse", "--model", str(adapter), *words, "--output_dir", str(tmp_path / "fused"))
    merged = merged_from(tmp_path / "fused", tmp_path / "merged")
    before, after = (
        Recommender.from_pretrained(folder, dtype="fp32", device="cpu") for folder in (tmp_path / "fused", merged)
    )
    assert after.pool is not None
    expected = {item.id: item.score for item in before.recommend([1, 2, 3], k=48)}
    found = {item.id: item.score for item in after.recommend([1, 2, 3], k=48)}
    assert found == pytest.approx(expected, abs=2 * ATOL)
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "pooled with experts: co_visitation" in card
    assert "# accelerate launch recipes/fuse.py --config fuse.yaml" in card
    assert "# accelerate launch recipes/sft.py --config sft.yaml" in card
