"""What the trainer relies on in TRL and transformers: if one of these fails, read the new version before using it."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from reasonrec.recipes.models.load import LoraSettings, add_adapter
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_version_this_was_written_for():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize("name", ["_get_train_sampler", "create_optimizer", "_save"])
def test_overridden_methods_exist_with_the_same_parameters(name):
    ours, theirs = getattr(ItemSFTTrainer, name), getattr(SFTTrainer, name)
    assert ours is not theirs
    assert parameters(ours) == parameters(theirs)
    for parameter in list(inspect.signature(theirs).parameters.values())[1:]:
        assert parameter.default is None


def test_nothing_else_is_overridden():
    """A private method of the same name in a new version would be replaced by accident."""
    ours = {name for name, value in vars(ItemSFTTrainer).items() if callable(value)}
    assert ours == {"__init__", "_get_train_sampler", "create_optimizer", "_save"}
    source = inspect.getsource(SFTTrainer) + inspect.getsource(Trainer)
    assert "_row_learning_rate" not in source


def test_the_trainer_calls_what_is_overridden():
    source = inspect.getsource(Trainer)
    assert "sampler_fn=self._get_train_sampler" in source
    assert "self.create_optimizer(" in source
    assert "self._save(output_dir" in inspect.getsource(Trainer.save_model)


def test_helpers_that_the_optimizer_is_built_with():
    assert parameters(Trainer.get_decay_parameter_names) == ["self", "model"]
    assert parameters(Trainer.get_optimizer_cls_and_kwargs) == ["args", "model"]
    assert isinstance(inspect.getattr_static(Trainer, "get_optimizer_cls_and_kwargs"), staticmethod)


def test_every_loss_comes_through_the_fused_head():
    """The item policy answers exactly this call; label smoothing and other loss functions pass it by."""
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in source
    assert "per_token_loss = -outputs.log_probs" in source
    assert 'inputs["use_cache"] = False' in source
    for used in ("outputs.label_mask.sum()", "outputs.entropy.detach()", "outputs.is_top1.sum()"):
        assert used in source
    assert "fused_lm_head=True" not in inspect.getsource(SFTTrainer.prediction_step)


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


def test_trl_rounds_trainable_weights_under_4_bit():
    """The reason why the trainer keeps start values; gone here means it can go there."""
    source = inspect.getsource(SFTTrainer.__init__)
    assert "param.data = param.data.to(torch.bfloat16)" in source
    assert source.index("torch.bfloat16)") < source.index("add_fused_lm_head("), "ours is installed after both"


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


def test_the_state_of_a_checkpoint_is_written_last():
    """`last_checkpoint` takes its presence for a whole checkpoint."""
    source = inspect.getsource(Trainer._save_checkpoint)
    last = source.index("self.state.save_to_json(os.path.join(output_dir, TRAINER_STATE_NAME))")
    for before in ("self.save_model(output_dir", "self._save_optimizer_and_scheduler(", "self._save_rng_state("):
        assert source.index(before) < last


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
