"""A few real steps: what should train trains, everything else stays as it is."""

from __future__ import annotations

import gc
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset as HfDataset
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig

from reasonrec.recipes.decoding import attention
from reasonrec.recipes.models.load import LoraSettings, add_adapter, add_code_rows, load_base, load_tokenizer
from reasonrec.recipes.models.precision import choose
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, save_weights
from reasonrec.recipes.trainers.quick import QuickTrainer
from reasonrec.recipes.trainers.resume import last_checkpoint
from reasonrec.recipes.trainers.watched import WatchedTrainer
from reasonrec.tokenizers.vocabulary import Vocabulary

SIZES = (3, 4, 2)
CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 2, -1], [1, 3, -1], [1, 1, -1], [2, 1, -1], [2, 3, -1]])
TEXTS = ["small oak lamp", "steel kettle", "velvet backpack", "bamboo novel", "marble tent", "a scarf", "a drill"]
HISTORIES = [[0, 3, 5], [1, 4], [6, 2, 1, 0], [5, 5, 6], [2, 0], [3, 1, 4], [4, 6, 2], [1, 5]]


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """Every training ends with `gc.collect()`, which would look through all imported libraries each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def untied_base(tiny_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_base, tie_word_embeddings=False)).save_pretrained(folder)
    load_tokenizer(str(tiny_base)).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tied", "untied"])
def base(request, tiny_base, untied_base) -> Path:
    return tiny_base if request.param == "tied" else untied_base


every_method = pytest.mark.parametrize("method", ["full", "lora", "qlora"])
adapters = pytest.mark.parametrize("method", ["lora", "qlora"])


def make_model(base: Path, method: str, dropout: float = 0.0):
    """Model, tokenizer and vocabulary; the same ones whenever it is called."""
    set_seed(0)
    tokenizer = load_tokenizer(str(base))
    vocabulary = Vocabulary.extend(tokenizer, SIZES)
    model = load_base(str(base), method=method)
    add_code_rows(model, tokenizer, vocabulary, CODES, TEXTS)
    if method != "full":
        model = add_adapter(model, vocabulary.token_ids, LoraSettings(4, 8, dropout, "all-linear"))
        with torch.no_grad():  # as a model that trained before: no value is one of bfloat16's
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 1e-3 * torch.randn_like(parameter)
    return model, tokenizer, vocabulary


@pytest.fixture
def make_trainer(policy_of):
    """Builds what recipes/sft.py builds, on histories that are written down."""

    def make(base: Path, out: Path, method: str, *, row_lr: float | None = None, dropout: float = 0.0, **options):
        model, tokenizer, vocabulary = make_model(base, method, dropout)
        ids = vocabulary.item_token_ids(CODES)
        prompt = tokenizer("History:", add_special_tokens=False)["input_ids"]
        examples = [
            ([*prompt, *(t for i in h[:-1] for t in ids[i]), vocabulary.begin_id], ids[h[-1]]) for h in HISTORIES
        ]
        data = {
            "input_ids": [prompt + answer for prompt, answer in examples],
            "labels": [[-100] * len(prompt) + answer for prompt, answer in examples],
        }
        settings = {
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "remove_unused_columns": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        return ItemSFTTrainer(
            policy=policy_of(tokenizer, vocabulary, CODES, TEXTS),
            row_learning_rate=row_lr,
            model=model,
            args=SFTConfig(output_dir=str(out), **(settings | options)),
            train_dataset=HfDataset.from_dict(data),
            processing_class=tokenizer,
        )

    return make


def snapshot(trainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of what trains and of everything else, buffers and 4-bit codes included."""
    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    # By place, not by name: a tied head lists the embedding's rows a second time.
    places = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad}
    frozen = {n: t.detach().clone() for n, t in trainer.model.state_dict().items() if t.data_ptr() not in places}
    return trained, frozen


def moved(trainer, before: dict[str, torch.Tensor]) -> dict[str, float]:
    now = dict(trainer.model.named_parameters())
    return {name: float((now[name].detach() - old).abs().max()) for name, old in before.items()}


@every_method
def test_everything_that_trains_moves_and_nothing_else(make_trainer, base, tmp_path, method):
    trainer = make_trainer(base, tmp_path, method)
    trained, frozen = snapshot(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(change > 0 for change in moved(trainer, trained).values())
    if method == "full":
        assert len(trained) == len(dict(trainer.model.named_parameters()))
        return
    assert {"lora_A", "lora_B", "trainable_tokens_delta"} == {
        part for name in trained for part in ("lora_A", "lora_B", "trainable_tokens_delta") if part in name
    }
    assert len(frozen) > 20
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], old) for name, old in frozen.items())


@adapters
def test_float32_adapters_start_as_they_were_and_feel_a_tiny_rate(make_trainer, tiny_base, tmp_path, method):
    """TRL casts them to bfloat16 under 4 bit, where a step of 1e-6 rounds to nothing."""
    trainer = make_trainer(tiny_base, tmp_path, method, learning_rate=1e-6)
    trained, _ = snapshot(trainer)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    alone, _, _ = make_model(tiny_base, method)
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(trained[name], parameter), f"{name} was rounded"
    trainer.train()
    changes = moved(trainer, trained)
    assert min(changes.values()) > 1e-7
    assert max(changes.values()) < 1e-5


def test_the_row_learning_rate_is_for_the_rows_only(make_trainer, base, tmp_path):
    """One step of plain gradient descent: the change is the rate times the gradient."""
    changes = {}
    for row_lr in (None, 0.5, 0.0):
        options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.1, "weight_decay": 0.0}
        trainer = make_trainer(base, tmp_path, "lora", row_lr=row_lr, **options)
        before, _ = snapshot(trainer)
        trainer.train()
        now = dict(trainer.model.named_parameters())
        changes[row_lr] = {name: now[name].detach() - old for name, old in before.items()}
    rows = [name for name in changes[None] if "trainable_tokens" in name]
    assert len(rows) == (1 if trainer.model.get_base_model().config.tie_word_embeddings else 2)
    for name, change in changes[None].items():
        if name in rows:
            assert change.abs().max() > 0
            torch.testing.assert_close(changes[0.5][name], 5 * change, atol=1e-6, rtol=1e-3)
            assert changes[0.0][name].abs().max() == 0
        else:
            assert torch.equal(changes[0.5][name], change)
            assert torch.equal(changes[0.0][name], change)


def test_weight_decay_spares_rows_and_norms(make_trainer, untied_base, tmp_path):
    for method, decayed in (("lora", {"lora_A", "lora_B"}), ("full", {"weight"})):
        trainer = make_trainer(untied_base, tmp_path, method, weight_decay=0.1, row_lr=None)
        name_of = {id(p): n for n, p in trainer.model.named_parameters()}
        groups = trainer.create_optimizer().param_groups
        trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        assert sorted(name_of[id(p)] for g in groups for p in g["params"]) == sorted(trainable), "each exactly once"
        with_decay = [name_of[id(p)] for g in groups if g["weight_decay"] for p in g["params"]]
        assert {part for n in with_decay for part in n.split(".")} >= decayed
        assert not any("norm" in name or "trainable_tokens" in name for name in with_decay)
        assert {g["weight_decay"] for g in groups} == {0.1, 0.0}


def test_the_plans_order_is_the_training_order(make_trainer, tiny_base, tmp_path):
    trainer = make_trainer(tiny_base, tmp_path, "lora", seed=7, data_seed=8)
    rows = [row for batch in trainer.get_train_dataloader() for row in batch["labels"].tolist()]
    shown = [[label for label in row if label != -100] for row in rows]
    ids = Vocabulary.extend(trainer.processing_class, SIZES).item_token_ids(CODES)
    assert shown == [ids[history[-1]] for history in HISTORIES]


@every_method
def test_a_few_answers_are_learnt_by_heart(make_trainer, tiny_base, tmp_path, method):
    trainer = make_trainer(
        tiny_base, tmp_path, method, num_train_epochs=25, per_device_train_batch_size=8, learning_rate=4e-3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The start is about uniform over the legal codes: 3 at the 8 first codes, 2 at the 8 second and 2 third ones.
    assert losses[0] == pytest.approx((8 * np.log(3) + 10 * np.log(2)) / 18, abs=0.2)
    assert losses[-1] < 0.35 * losses[0]
    assert trainer.state.log_history[-2]["mean_token_accuracy"] > 0.85


@every_method
def test_a_checkpoint_holds_what_trained_and_resuming_changes_nothing(make_trainer, tiny_base, tmp_path, method):
    options = {"save_strategy": "steps", "save_steps": 2, "dropout": 0.0 if method == "full" else 0.2}
    whole = make_trainer(tiny_base, tmp_path, method, **options)
    whole.train()
    folder = last_checkpoint(tmp_path)
    assert folder is not None
    assert folder.name == "checkpoint-4"
    first = tmp_path / "checkpoint-2"
    names = {path.name for path in first.iterdir()}
    weights = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert {weights, "trainer_state.json", "optimizer.pt"} <= names
    assert "training_args.bin" not in names, "a pickle"
    with safe_open(first / weights, "pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    if method != "full":
        assert all("lora_" in name or shape == [1 + sum(SIZES), 64] for name, shape in shapes.items())
        assert len(shapes) == 2 * 2 * 7 + 1
    again = make_trainer(tiny_base, tmp_path / "again", method, **options)
    again.train(resume_from_checkpoint=str(first))
    assert again.state.global_step == 4
    now = dict(again.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(now[name], parameter), name


@adapters
def test_what_is_saved_is_the_adapter_in_safetensors(make_trainer, base, tmp_path, method):
    trainer = make_trainer(base, tmp_path / "run", method)
    trainer.train()
    save_weights(trainer.model, tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as stored:
        tensors = [stored.get_tensor(name) for name in stored.keys()]  # noqa: SIM118
    assert sorted(float(t.double().sum()) for t in tensors) == sorted(float(p.double().sum()) for p in trained)
    assert {t.dtype for t in tensors} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_quick_way_to_the_loss_has_the_same_gradients(
    make_trainer, tiny_base, tmp_path, monkeypatch, precision, checkpointing
):
    monkeypatch.setattr(attention, "_FEWEST", 1)
    chosen = partial(load_base, precision=choose(precision, "cpu"))
    monkeypatch.setattr(sys.modules[__name__], "load_base", chosen)
    ours = QuickTrainer.compute_loss_context_manager
    products, plain = [], attention.torch.bmm
    monkeypatch.setattr(attention.torch, "bmm", lambda *a: (products.append(a[0].dtype), plain(*a))[1])

    def gradients(way) -> torch.Tensor:
        monkeypatch.setattr(QuickTrainer, "compute_loss_context_manager", way)
        options = {"bf16": precision == "bf16", "gradient_checkpointing": checkpointing, "max_steps": 1}
        trainer = make_trainer(tiny_base, tmp_path, "lora", max_grad_norm=0.0, optim="sgd", **options)
        before, _ = snapshot(trainer)
        trainer.train()
        now = dict(trainer.model.named_parameters())
        assert trainer.model.config._attn_implementation == "sdpa", "as it was"
        assert all(m.cast_input_dtype_enabled for m in trainer.model.modules() if isinstance(m, LoraLayer))
        return torch.cat([(now[name].detach() - old).flatten() for name, old in before.items()])

    expected = gradients(WatchedTrainer.compute_loss_context_manager)
    assert not products
    found = gradients(ours)
    assert checkpointing or set(products) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert expected.norm() > 0.01
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if precision == "fp32" else 0.03)
