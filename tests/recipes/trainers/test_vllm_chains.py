"""vLLM as far as it goes without vLLM: what is refused, what it would be given, and what it would be asked."""

from __future__ import annotations

import inspect
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from reasonrec.recipes.decoding.sample import Sampler, noise
from reasonrec.recipes.trainers.chain_engines import check_chain_engine
from reasonrec.recipes.trainers.item_grpo import RolloutSettings
from reasonrec.recipes.trainers.vllm_chains import check_version, engine_copy, request
from reasonrec.tokenizers.errors import UserError

REASONING = RolloutSettings(rounds=1, max_chain=4)


def test_where_it_is_missing_or_another_version() -> None:
    with pytest.raises(
        UserError, match=r"needs vllm .*0\.22.* \(TRL 1\.16\..*\), and it is not installed: pip install"
    ):
        check_version(None)
    for version in ("0.21.0", "0.32.0", "1.0"):
        with pytest.raises(UserError, match=rf"and {version} is installed: pip install \"vllm.*chain_engine=own"):
            check_version(version)
    for version in ("0.22.0", "0.31.0"):
        check_version(version)


@pytest.mark.skipif(find_spec("vllm") is not None and torch.cuda.is_available(), reason="vLLM may work here")
def test_it_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="chain_engine=vllm needs"):
        check_chain_engine("vllm", 8)
    with pytest.raises(UserError, match="mode=direct has none"):
        check_chain_engine("vllm", 0)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_engine_is_given_the_policy(tiny_base, make_grpo, method, tmp_path) -> None:
    """As a folder that plain transformers loads, with the logits of the policy, whatever else is beside it."""
    trainer = make_grpo(tiny_base, method, settings=REASONING, beta=0.0 if method == "full" else 0.1, max_steps=2)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    eos_id = trainer.eos_token_ids[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine_copy(model, eos_id).save_pretrained(tmp_path / "whole")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == eos_id
    ids = torch.tensor([trainer._prompts.token_ids(0)])
    policy = trainer._base().eval()
    with torch.no_grad():
        expected, found = policy(input_ids=ids).logits, loaded.float().eval()(input_ids=ids).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)
    rows = loaded.get_input_embeddings().weight[trainer._policy.vocabulary.token_ids]
    head = policy.get_input_embeddings().weight[trainer._policy.vocabulary.token_ids]
    torch.testing.assert_close(rows, head.bfloat16().float(), atol=0, rtol=0)


def test_a_copy_can_be_made_under_mixed_precision(tiny_base, make_grpo) -> None:
    trainer = make_grpo(tiny_base, "lora", settings=REASONING, bf16=True, max_steps=1)
    trainer.train()
    copied = engine_copy(trainer.accelerator.unwrap_model(trainer.model), trainer.eos_token_ids[0])
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}


def test_weights_that_no_architecture_knows_are_refused(tiny_base, make_kit) -> None:
    kit = make_kit(tiny_base, "lora")
    kit.base.more = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"plain llama models, and this one differs in more\.bias, more\.weight"):
        engine_copy(kit.model, 2)


def test_trl_feeds_the_copy_by_the_names_of_its_architecture(tiny_base, make_grpo) -> None:
    """TRL's own walk over what it is given: it would name the code rows of an adapter as no engine does."""
    trainer = make_grpo(tiny_base, "lora", settings=REASONING)
    feeding = VLLMGeneration.__new__(VLLMGeneration)  # without an engine to feed
    feeding.model = copied = engine_copy(trainer.accelerator.unwrap_model(trainer.model), trainer.eos_token_ids[0])
    feeding.accelerator = trainer.accelerator
    feeding._dist = DistributedBackend(trainer.accelerator)
    fed = dict(feeding._iter_named_params())
    assert fed.keys() == dict(copied.named_parameters()).keys()
    assert fed.keys() < AutoModelForCausalLM.from_config(copied.config).state_dict().keys(), "tied weights once"
    assert {value.dtype for value in fed.values()} == {torch.bfloat16}


def test_what_is_relied_on_in_trl(tiny_base, make_grpo) -> None:
    takes = inspect.signature(VLLMGeneration.__init__).parameters
    assert list(takes)[1:4] == ["model", "accelerator", "processing_class"]
    assert {"mode", "gpu_memory_utilization"} <= takes.keys()
    assert takes["enable_sleep_mode"].default is False
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    source = inspect.getsource(VLLMGeneration._init_vllm)
    for said in ("model=model.name_or_path", 'logprobs_mode="processed_logprobs"', 'backend="external_launcher"'):
        assert said in source
    assert make_grpo(tiny_base).args.vllm_gpu_memory_utilization == 0.3
    assert metadata.version("trl").startswith("1.16.")


def test_what_the_engine_is_asked() -> None:
    uniform = noise(0, 3, [7, 9], 3, 12)
    rows, asked = request([[1, 2], [3]], Sampler(3, 0.7, 10, (50,)), [2, 2, 40], uniform)
    assert [row["prompt_token_ids"] for row in rows] == [[1, 2]] * 3 + [[3]] * 3
    seeds = [one.pop("seed") for one in asked]
    assert len(set(seeds)) == 6, "every chain has its own"
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert asked == [
        {
            "temperature": 0.7, "max_tokens": 10, "stop_token_ids": [2, 40, 50], "ignore_eos": True, "logprobs": 0,
            "detokenize": False,
        }
    ] * 6  # fmt: skip
    alone = request([[3]], Sampler(3, 0.7, 10, (50,)), [2], uniform[1:])[1]
    assert [one["seed"] for one in alone] == seeds[3:], "whatever is asked beside it"
    _, asked = request([[1]], Sampler(1, 0.7, 10, (50, 51), greedy=True), [2], None)
    assert asked[0]["temperature"] == 0
    assert asked[0]["stop_token_ids"] == [2], "a delimiter of several tokens is found afterwards"
    assert np.issubdtype(type(asked[0]["seed"]), np.integer)
