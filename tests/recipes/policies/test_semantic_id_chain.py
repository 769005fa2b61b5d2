"""Items that a chain names are free text; items of a history and of an answer are choices among items."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.semantic_id import CodeAnswers
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

BEGIN = 12
VOCABULARY = Vocabulary((3, 4), begin_id=BEGIN)
CODES = np.array([[0, 0], [0, 2], [1, 3], [2, 1]])
IDS = VOCABULARY.item_token_ids(CODES)
TRIE = Trie.from_codes(CODES, (3, 4))


def scored(ids: list[int], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the policy, and of the softmax over the full vocabulary, at each label's place."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY.size, initializer_range=0.3, **sizes)).eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        free = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        install(model, CodeAnswers(TRIE, VOCABULARY))
        policy = model(input_ids=tokens, labels=torch.tensor([labels]), fused_lm_head=True).log_probs[0]
    return policy, free


def test_a_chain_is_scored_as_the_text_it_is_and_its_answer_as_a_choice():
    ids = [3, *IDS[1], 4, 5, *IDS[2], *IDS[0], 6, BEGIN, *IDS[3]]
    labels = [-100] * 4 + ids[4:]
    policy, free = scored(ids, labels)
    chain, answer = slice(3, len(ids) - 3), slice(len(ids) - 3, None)
    torch.testing.assert_close(policy[chain], free[chain])
    assert (policy[:3] == 0).all()
    assert (policy[answer] > free[answer] + 0.1).all()
    assert policy[-1] == 0, "2 has but one child"


def test_a_history_without_words_is_a_row_of_choices():
    ids = [3, *IDS[1], *IDS[2], BEGIN, *IDS[0]]
    labels = [-100, *IDS[1], *IDS[2], -100, *IDS[0]]
    policy, free = scored(ids, labels)
    places = [0, 1, 2, 3, 5, 6]
    assert (policy[places] > free[places]).all()
    assert policy[3] == 0, "1 has but one child"
