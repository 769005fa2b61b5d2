"""The rows of an evaluation: baselines, trained models in both modes, and the controls that belong to them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import polars as pl

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.decoding.consistency import Consistency
from reasonrec.recipes.evaluation.compare import BASELINE, CONTROL, DIRECT, REASONING, Row
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.precision import of_encoder
from reasonrec.recipes.rankers import baselines, sasrec
from reasonrec.recipes.rankers.base import Controlled, Noted, Ranker, Thinks
from reasonrec.recipes.rankers.consistent import ConsistentRanker, unchecked
from reasonrec.recipes.rankers.consistent_chains import ConsistentChains, unstated
from reasonrec.recipes.rankers.fused import Fused
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.rankers.pool import ExpertsOnly
from reasonrec.recipes.rankers.pooled import controls
from reasonrec.recipes.rankers.reasoning import Reasoner, ReasoningRanker, Thinking
from reasonrec.recipes.rankers.text import TextNeighbours
from reasonrec.recipes.rankers.top_k import KS
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.terminal import say


class RankingOptions(Protocol):
    """How rows are ranked; `recipes/eval_ranking.py` has them all."""

    num_beams: int
    exact: bool
    exhaustive: bool
    batch_size: int
    control: bool
    baselines: bool
    candidates: Literal["all", "cold"]
    window: int
    embedding_model: str | None
    fuse: bool
    sasrec_trials: int
    base_model: str | None
    precision: PrecisionName
    trust_remote_code: bool
    device: str | None
    seed: int


class Table:
    """Ranks the same cases with one ranker after the other.

    Args:
        options: How.
        dataset: The dataset.
        cases: Its held-out rows.
        rules: What paths have to keep to, in a further row of each model that can be asked.

    Attributes:
        rows: The rows so far.
        claims: Pairs of names (a, b) whose difference is tested.
        thoughts: The first chain for each case, as text, by the name of the row.
    """

    def __init__(
        self, options: RankingOptions, dataset: Dataset, cases: pl.DataFrame, rules: Consistency | None = None
    ) -> None:
        self.options, self.dataset, self.cases, self.rules = options, dataset, cases, rules or Consistency()
        self.rows: list[Row] = []
        self.claims: list[tuple[str, str]] = []
        self.thoughts: dict[str, list[str]] = {}
        self._experts: list[Ranker] = []  # what is fused
        self._fused: Fused | None = None
        self._models: set[str] = set()  # hashes of those that stand in the table

    def add_baselines(self) -> None:
        """Counting baselines, the neighbours of a text encoder, and SASRec tuned on validation."""
        options = self.options
        if options.baselines:
            for baseline, note in baselines.standard(self.dataset, window=options.window):
                self._add(baseline, BASELINE, note)
                if isinstance(baseline, baselines.CoVisitation):
                    self._experts[:1] = [baseline]  # the tuned one comes last
            if options.candidates == "cold":
                self._add(baselines.RandomOrder(self.dataset.n_items, options.seed), BASELINE, "")
        if options.embedding_model is not None:
            compute = of_encoder(options.precision, options.device)
            text = TextNeighbours.of(self.dataset, options.embedding_model, compute=compute)
            self._add(text, BASELINE, "untrained")
            self._experts.append(text)
        if options.sasrec_trials:
            model, tried = sasrec.tune(self.dataset, options.sasrec_trials, sasrec.SasrecConfig(seed=options.seed))
            self._add(model, BASELINE, f"best of {len(tried)} configurations on validation")
            self._experts.append(model)
        if options.fuse:
            self._fused = self._fuse(self._experts, "fused without an LLM")
            self._add(self._fused, BASELINE, str(self._fused))

    def _fuse(self, experts: list[Ranker], name: str) -> Fused:
        popularity = self.dataset.items["train_count"].to_numpy()
        return Fused.fit(experts, self.dataset.rows("valid"), popularity, name, seed=self.options.seed)

    def add_model(self, path: str, manifest: Manifest, thinking: Thinking | None = None) -> None:
        """A trained model, compared with those before it that rank at once, and its controls.

        Another user's history is left out where the model that this one started from stands in the table: it was asked
        there. One with experts is ranked with them, and, unless that model stands in the table, without.

        Args:
            path: Its folder.
            manifest: Its manifest.
            thinking: How chains are written; without, it ranks at once.
        """
        options, recommender, name = self.options, self._load(path), Path(path).name
        note = f"{recommender.setting.base_model}, {recommender.setting.method}"
        before = [row.name for row in self.rows if row.mode == DIRECT]  # such as what it started from
        ranker: Ranker
        if thinking is None:
            ranker = self._direct(recommender, name)
            again = manifest.inputs.get("model") in self._models
            self._models.add(manifest.hash)
        else:
            chains = "1 greedy chain" if thinking.chains == 1 else f"{thinking.chains} sampled chains"
            reasoner = Reasoner(recommender, max(KS), options.num_beams, options.batch_size, progress=True)
            ranker = ReasoningRanker(reasoner, thinking, f"{name}, {chains}, beam {options.num_beams}")
            again = False
        if isinstance(ranker, ModelRanker) and recommender.pool is not None:
            self._add_pooled(ranker, before)
            if again:
                return
        self._add(ranker, DIRECT if thinking is None else REASONING, note)
        self.claims += [(ranker.name, other) for other in before]
        self._add_consistent(ranker, note)
        if options.control and not again and isinstance(ranker, Controlled):
            for control, what in ranker.controls(self.cases, options.seed):
                self._add(control, CONTROL, what or note)
                self.claims.append((ranker.name, control.name))
        if options.baselines and thinking is None:
            self.claims.append((ranker.name, "popularity"))
        if self._fused is not None and thinking is None:
            fused = self._fuse([*self._experts, ranker], f"fused with {name}")
            self._add(fused, DIRECT, str(fused))
            self.claims += [(fused.name, self._fused.name), (fused.name, ranker.name)]

    def _add_pooled(self, alone: ModelRanker, before: list[str]) -> None:
        """A model with its experts, compared with what stands in the table, and with the same without it."""
        pooled = replace(alone, name=f"{alone.name}, with its experts", pooled=True)
        self._add(pooled, DIRECT, str(pooled.recommender.pool))
        self.claims += [(pooled.name, other) for other in before]
        if self.options.control:
            for control, what in controls(pooled, self.dataset, seed=self.options.seed):
                self._add(control, BASELINE if isinstance(control, ExpertsOnly) else CONTROL, what)
                self.claims.append((pooled.name, control.name))

    def _add_consistent(self, ranker: Ranker, note: str) -> None:
        """The same model with what it says checked, compared with itself; left out where nothing can be compared."""
        rules = self.rules
        checked: ConsistentRanker | ConsistentChains | None
        if isinstance(ranker, ModelRanker) and rules.theta is not None:
            what, why = f"paths (theta={rules.theta:g})", unchecked(ranker.recommender)
            checked = ConsistentRanker(ranker, rules) if why is None else None
        elif isinstance(ranker, ReasoningRanker) and rules.chain_theta is not None:
            what, why = f"chains (chain_theta={rules.chain_theta:g})", unstated(ranker.reasoner.recommender)
            checked = ConsistentChains(replace(ranker), rules.chain_theta) if why is None else None
        else:
            return
        if checked is None:
            say(f"{ranker.name}: no row with consistent {what}: {why}")
            return
        self._add(checked, DIRECT if isinstance(ranker, ModelRanker) else REASONING, note)
        self.claims.append((checked.name, ranker.name))
        say(checked.note)

    def _direct(self, recommender: Recommender, name: str) -> ModelRanker:
        options = self.options
        how = "exact search" if options.exact else f"beam {options.num_beams}"
        if options.exhaustive or options.num_beams >= self.dataset.n_items:
            how = "exhaustive"
        return ModelRanker(
            recommender,
            f"{name}, {how}",
            num_beams=options.num_beams,
            exact=options.exact,
            exhaustive=options.exhaustive,
            batch_size=options.batch_size,
            progress=True,
        )

    def _load(self, path: str) -> Recommender:
        recommender = Recommender.from_pretrained(
            path,
            base_model=self.options.base_model,
            dtype=self.options.precision,
            device=self.options.device,
            trust_remote_code=self.options.trust_remote_code,
        )
        if is_first_process():
            say(f"{path}: {recommender.precision}")
        return recommender

    def _add(self, ranker: Ranker, mode: str, note: str) -> None:
        begin = time.perf_counter()
        ranking = ranker.rank(self.cases, max(KS))
        seconds = (time.perf_counter() - begin) / max(self.cases.height, 1)
        if isinstance(ranker, Noted):
            note = f"{note}; {ranker.note}"
        row = Row(ranker.name, mode, ranking, seconds_per_user=seconds, note=note)
        if isinstance(ranker, Thinks):
            cut = f"{note}; {ranker.cut:.1%} of the chains were cut"
            row = replace(row, tokens_per_user=ranker.tokens_per_user, note=cut)
            self.thoughts[ranker.name] = ranker.thoughts
        self.rows.append(row)
