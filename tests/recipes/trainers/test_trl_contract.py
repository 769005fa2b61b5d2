"""What the trainer relies on in TRL and transformers: if one of these fails, read the new version before using it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from reasonrec.recipes.models.load import LoraSettings, add_adapter, load_tokenizer
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

ROWS = [[3, 4, 5, 6], [5, 6, 7], [7, 8, 9, 10, 11], [9, 10]]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture
def plain(tiny_base, tmp_path):
    """Builds TRL's own trainer, or a class made of it: two steps on four rows, whose first token is context."""

    def build(cls: type[SFTTrainer] = SFTTrainer, model: Any = None, **options: Any) -> Any:
        settings = {
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 2, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
            "gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "optim": "sgd",
        }  # fmt: skip
        rows = Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS])
        return cls(
            model=tiny_llama() if model is None else model,
            args=SFTConfig(str(tmp_path / "plain"), **(settings | options)),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=load_tokenizer(str(tiny_base)),
        )

    return build


def watch_forward(model: Any) -> list[tuple[dict[str, Any], Any]]:
    """A list that fills with what the model is called with and what it answers."""
    calls: list[tuple[dict[str, Any], Any]] = []
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        calls.append((kwargs, answer))
        return answer

    model.forward = watched
    return calls


def test_the_version_this_was_written_for():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize("name", ["_get_train_sampler", "create_optimizer", "_save"])
def test_overridden_methods_exist_with_the_same_parameters(name):
    ours, theirs = getattr(ItemSFTTrainer, name), getattr(SFTTrainer, name)
    assert ours is not theirs
    assert parameters(ours) == parameters(theirs)
    for parameter in list(inspect.signature(theirs).parameters.values())[1:]:
        assert parameter.default is None


def test_nothing_else_is_overridden(plain):
    """A private method or attribute of the same name in a new version would be replaced by accident."""
    ours = {name for name, value in vars(ItemSFTTrainer).items() if callable(value)}
    assert ours == {"__init__", "_get_train_sampler", "create_optimizer", "_save"}
    trainer = plain()
    trainer.train()
    assert not {"_row_learning_rate", "_losses", "_skipped", "_whole"} & {*vars(trainer), *dir(SFTTrainer)}


def test_the_trainer_calls_what_is_overridden(plain):
    called = []

    class Watched(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            called.append("sampler")
            return super()._get_train_sampler(train_dataset)

        def create_optimizer(self, model=None):
            called.append("optimizer")
            return super().create_optimizer(model)

        def _save(self, output_dir=None, state_dict=None):
            called.append("save")
            super()._save(output_dir, state_dict)

    trainer = plain(Watched, save_strategy="steps", save_steps=2)
    trainer.train()
    assert set(called[:-1]) == {"sampler", "optimizer"}
    assert called[-1] == "save"
    trainer.save_model()
    assert called[-2:] == ["save", "save"]


def test_helpers_that_the_optimizer_is_built_with():
    assert parameters(Trainer.get_decay_parameter_names) == ["self", "model"]
    assert parameters(Trainer.get_optimizer_cls_and_kwargs) == ["args", "model"]
    assert isinstance(inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs"), staticmethod)


def test_every_loss_comes_through_the_fused_head(plain):
    """The item policy answers exactly this call; label smoothing and other loss functions pass it by."""
    trainer = plain()
    calls = watch_forward(trainer.model)
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 3, "two steps, one batch of the evaluation"
    assert all(kwargs["fused_lm_head"] is True and kwargs["use_cache"] is False for kwargs, _ in calls)
    history = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
    for line, (_, answer) in zip(history, calls, strict=True):
        valid, prefix = answer.label_mask.sum(), "eval_" if "eval_loss" in line else ""
        assert line[f"{prefix}loss"] == pytest.approx(float(-answer.log_probs.detach().sum() / valid), abs=1e-4)
        assert line[f"{prefix}entropy"] == pytest.approx(float(answer.entropy.detach().sum() / valid), abs=1e-4)
        assert line[f"{prefix}mean_token_accuracy"] == pytest.approx(float(answer.is_top1.sum() / valid), abs=1e-4)


def test_where_tokens_are_counted(plain):
    """In an attribute that no checkpoint holds."""
    trainer = plain()
    trainer.train()
    assert trainer._total_train_tokens == sum(map(len, ROWS))
    assert [line["num_tokens"] for line in trainer.state.log_history if "loss" in line][-1] == sum(map(len, ROWS))
    assert trainer.state.num_input_tokens_seen == 0


def test_fields_of_the_fused_output():
    names = {f.name for f in fields(FusedCausalLMOutput)}
    assert {"loss", "log_probs", "entropy", "is_top1", "label_mask"} <= names
    out = FusedCausalLMOutput(loss=torch.zeros(()))
    assert out.log_probs is None, "fields may be left out"


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_our_answer_on_text_is_trls_own():
    """Same shapes, dtypes and numbers as the head that is replaced, where no item is involved."""
    vocabulary = Vocabulary((2, 2), begin_id=15)
    trie = Trie.from_codes(torch.tensor([[0, 0], [1, 1]]).numpy(), (2, 2))
    ids = torch.randint(0, 15, (3, 8))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1] = -100
    theirs_model, ours_model = tiny_llama(), tiny_llama()
    add_fused_lm_head(theirs_model, outputs=("log_probs", "entropy", "is_top1"))
    add_fused_lm_head(ours_model, outputs=("log_probs", "entropy", "is_top1"))  # what TRL did before ours is installed
    install(ours_model, CodeAnswers(trie, vocabulary))
    calls = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}
    theirs, ours = (model(**calls, fused_lm_head=True) for model in (theirs_model, ours_model))
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)
    theirs.loss.backward()
    ours.loss.backward()
    for (name, a), b in zip(ours_model.named_parameters(), theirs_model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)
    plain = ours_model(input_ids=ids, labels=labels)
    torch.testing.assert_close(plain.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert plain.logits.shape == (3, 8, 20)


def test_trl_rounds_trainable_weights_under_4_bit(plain):
    """The reason why the trainer keeps start values; gone here means it can go there."""
    model = tiny_llama()
    model.is_loaded_in_4bit = True  # what TRL asks; the weights are whole
    trainer = plain(model=model)
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    ids = torch.tensor([ROWS[0]])
    answer = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert answer.log_probs is not None, "the head is there once the trainer is built: ours is installed after it"


@pytest.mark.parametrize("tied", [True, False])
def test_peft_keeps_rows_where_they_are_looked_for(tied):
    model = tiny_llama(tie_word_embeddings=tied)
    plain = model.get_input_embeddings()
    vocabulary = Vocabulary((2, 2), begin_id=15)
    wrapped = add_adapter(model, vocabulary.token_ids, LoraSettings(2, 4, 0.0, "all-linear"))
    names = {name.rsplit(".", 2)[-2:][0] for name, _ in wrapped.named_parameters() if "trainable_tokens" in name}
    assert names == {"trainable_tokens_delta"}
    inside, head = model.get_input_embeddings().token_adapter, model.get_output_embeddings().token_adapter
    assert set(inside.trainable_tokens_delta) == {"default"}
    assert (inside.trainable_tokens_delta["default"] is head.trainable_tokens_delta["default"]) == tied
    for adapter in (inside, head):
        assert adapter.token_indices["default"] == vocabulary.token_ids
        assert (adapter.merged, adapter.disable_adapters, list(adapter.active_adapters)) == (False, False, ["default"])
    assert inside.get_base_layer() is plain


def test_the_state_of_a_checkpoint_is_written_last(plain, monkeypatch):
    """`last_checkpoint` takes its presence for a whole checkpoint."""
    before = []
    save = TrainerState.save_to_json

    def watched(state: TrainerState, path: str) -> None:
        before.append({file.name for file in Path(path).parent.iterdir()})
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    trainer = plain(save_strategy="steps", save_steps=2)
    trainer.train()
    after = {file.name for file in Path(trainer.args.output_dir, "checkpoint-2").iterdir()}
    assert before == [after - {"trainer_state.json"}]
    assert after >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


CONFIG_FIELDS = """
output_dir report_to logging_steps save_steps save_total_limit lr_scheduler_type warmup_steps packing max_steps
assistant_only_loss use_cpu num_train_epochs per_device_train_batch_size gradient_accumulation_steps data_seed seed
remove_unused_columns dataset_kwargs learning_rate weight_decay bf16 gradient_checkpointing trust_remote_code
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", CONFIG_FIELDS)
def test_configuration_fields_exist(name):
    assert name in {f.name for f in fields(SFTConfig)}


def test_our_arguments_add_the_precision_and_only_change_defaults():
    ours, theirs = ({f.name for f in fields(cls)} for cls in (SftArguments, SFTConfig))
    assert ours - theirs == {"precision"}
    assert theirs <= ours


def test_defaults_that_the_item_policy_relies_on(tmp_path):
    args = SftArguments(output_dir=str(tmp_path), bf16=False)
    assert args.loss_type == "nll"
    assert args.label_smoothing_factor == 0
    assert not args.packing
    assert not args.padding_free
    assert args.average_tokens_across_devices, "the loss of two processes is then that of one"
    assert args.dataloader_drop_last is False
    assert args.save_strategy == "steps"
