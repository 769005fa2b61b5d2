"""Completions of which it is known what they are worth.

A small catalogue, a target for each case and completions that recommend it, miss it, or are malformed: everything that
a rollout can produce and the author of a reward does not think of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reasonrec.rewards.calling import BEAM
from reasonrec.rewards.collaborative import CoVisits
from reasonrec.rewards.parse import Codes, Parser
from reasonrec.rewards.sets import Codewords
from reasonrec.tokenizers.index import ItemIndex, build_index
from reasonrec.tokenizers.vocabulary import BEGIN, Vocabulary, code_token

GOLDEN = "exact hit"
_FIRST_ID = 1000
_END = 2
_TARGET = 0  # item (0, 0, 0, 0): it has a disambiguation code, as items 1 and 2 have
_CHAIN = "Bought a drill, then wood screws and a level; a shelf is going up, so wall plugs come next. "


@dataclass(frozen=True)
class Case:
    """A completion and what it is.

    Attributes:
        name: What it is.
        kind: `golden`, `miss` (a valid answer, not the target), `adversarial` or `malformed`.
        chain: Text before the answer.
        codes: Codes behind the begin marker; None leaves the answer away.
        after: Text behind the answer.
        target: Item that came next.
    """

    name: str
    kind: str
    chain: str
    codes: Codes | None
    after: str = ""
    target: int = _TARGET


def small_index() -> ItemIndex:
    """Twelve items on three levels: three share all codes, so that they have disambiguation codes."""
    codes = [[0, 0, 0]] * 3 + [[0, 0, 1], [0, 1, 0], [0, 2, 2], [1, 0, 0], [1, 1, 1], [1, 2, 3], [2, 0, 3]]
    return build_index(np.array([*codes, [3, 1, 2], [3, 3, 3]]), [4, 4, 4])


def cases(reasoning: bool) -> list[Case]:
    """All completions of a mode."""
    chain = _CHAIN if reasoning else ""
    hit, unique = (0, 0, 0, 0), (0, 0, 1)
    result = [
        Case(GOLDEN, "golden", chain, hit),
        Case("exact hit, item without disambiguation code", "golden", chain, unique, target=3),
        Case("exact hit, the same prompt again", "golden", chain, hit),
        Case("right levels, wrong disambiguation code", "miss", chain, (0, 0, 0, 1)),
        Case("two of three levels right", "miss", chain, (0, 0, 1)),
        Case("one of three levels right", "miss", chain, (0, 2, 2)),
        Case("another item", "miss", chain, (3, 3, 3)),
        Case("the same other item again", "miss", chain, (3, 3, 3)),
        Case("the last item of the history again", "miss", chain, (1, 1, 1)),
        Case("missing disambiguation code", "adversarial", chain, (0, 0, 0)),
        Case("extra disambiguation code", "adversarial", chain, (0, 0, 1, 0), target=3),
        Case("codes outside the catalogue", "adversarial", chain, (0, 0, 3)),
        Case("two items behind one marker", "adversarial", chain, (0, 0, 1), _text((0, 1, 0)), target=3),
        Case("text behind the answer", "adversarial", chain, hit, "I am sure of it."),
        Case("a second answer", "adversarial", chain, (3, 3, 3), BEGIN + _text(hit)),
        Case("very long", "adversarial", _CHAIN * 1000, hit),
        Case("one phrase over and over", "adversarial", "wall plugs " * 300, hit),
        Case("no answer", "malformed", _CHAIN, None),
        Case("empty", "malformed", "", None),
        Case("begin marker and nothing else", "malformed", chain, ()),
        Case("unfinished codes", "malformed", chain, (0, 0)),
        Case("the target's codes without a begin marker", "malformed", _CHAIN + _text(hit), None),
        Case("unicode", "malformed", "🔩 Dübel für die Wand — 壁のプラグ \u202e\u0000 ", None),
        Case("braces and control tokens as text", "malformed", "{chain} %s <|im_end|> \\n ", None),
    ]
    if reasoning:
        result += [
            Case("answer before think", "adversarial", "", hit, _CHAIN),
            Case("no chain", "adversarial", "", hit),
            Case("unicode before the answer", "golden", "🔩 Dübel für die Wand — 壁のプラグ ", hit),
        ]
    return result


def make_batch(chosen: Sequence[Case], reasoning: bool, width: int = BEAM) -> dict[str, Any]:
    """All keywords that a reward can ask for, for some cases.

    Args:
        chosen: The cases.
        reasoning: Whether they are those of reasoning mode.
        width: Length of the lists in `beam_items`; as in a training, the catalogue is the most.
    """
    index = small_index()
    width = min(width, index.n_items)
    vocabulary = Vocabulary(index.level_sizes, _FIRST_ID)
    parser = Parser(vocabulary, index, reasoning=reasoning, end_ids=(_END,))
    texts = [
        case.chain + (BEGIN + _text(case.codes) if case.codes is not None else "") + case.after for case in chosen
    ]
    words: dict[str, int] = {}
    ids = [parser.ids_of_text(text, words) for text in texts]
    parsed = parser(ids)
    tuples = index.tuples()
    predicted = parsed.predicted_items
    hits = [item == case.target for item, case in zip(predicted, chosen, strict=True)]
    sequences = [[7, 6, 0, 1, 3], [7, 0, 4, 3], [5, 6, 0], [8, 9, 10, 11], [2, 3, 7, 0], [9, 8, 11]]
    return {
        "prompts": ["History:" + "".join(_text(tuples[item]) for item in (8, 6, 7))] * len(chosen),
        "completions": texts,
        "completion_ids": [[*row, _END] for row in ids],
        **parsed.columns(),
        "target_codes": [tuples[case.target] for case in chosen],
        "target_items": [case.target for case in chosen],
        "history_items": [[8, 6, 7] for _ in chosen],
        "depth": index.depth,
        "reasoning": reasoning,
        # A beam finds what was sampled first, and the target in the second place at best.
        "beam_items": [
            [*found, *[-1] * index.n_items][:width]
            for found in (
                [item, case.target, 5] if item >= 0 and not hit else [case.target, 5, 4] if hit else [4, 5]
                for item, hit, case in zip(predicted, hits, chosen, strict=True)
            )
        ],
        "target_log_prob": [
            -0.7 if hit else -2.5 if item >= 0 else -6.0 for item, hit in zip(predicted, hits, strict=True)
        ],
        "target_rating": [None if case.kind == "malformed" else 4.0 for case in chosen],
        # A category head that is sure of a hit from the first step on, and else comes round to what was written.
        "category_probs": [
            [[0.7, 0.2, 0.1, 0.0]] * 3 if hit else [[0.7, 0.2, 0.1, 0.0], [0.3, 0.4, 0.3, 0.0], [0.1, 0.8, 0.0, 0.1]]
            for hit in hits
        ],
        "categories": index.codes[:, 0].astype(np.int64),
        "codewords": Codewords(index.codes[:, :-1], np.eye(12).reshape(3, 4, 12)),
        "similarity": CoVisits(
            np.concatenate(sequences), np.repeat(np.arange(len(sequences)), list(map(len, sequences))), index.n_items
        ),
        "train_counts": np.bincount(np.concatenate(sequences), minlength=index.n_items),
    }


def _text(codes: Codes | None) -> str:
    return "".join(code_token(level, code) for level, code in enumerate(codes or ()))
