"""TRL's GRPOTrainer with the item policy and our own rollouts; losses, KL, clipping and checkpoints stay TRL's.

What is changed, and where:
    The policy: `policies.base.install` answers the model call by which TRL gets every log-probability (current, old
    and reference alike), so what is sampled from is what is optimised.
    The rollouts: a generation step takes its prompts from `prompt_block`, rolls out until enough groups have variance,
    and hands the chosen ones to TRL through its `rollout_func`, with rewards and advantages that are known by then.
    Processes share the work by prompts, see all scores, and choose the same groups.
    The reference: TRL's frozen copy of the adapter, with the code rows that TRL leaves out.
    Dropout: TRL turns modules off; here numbers that kernels read are as well (`silence_dropout`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset as HfDataset
from numpy.typing import NDArray
from transformers import TrainerControl
from trl import GRPOTrainer

from reasonrec.data_gen.tasks.rl_prompts import RlPrompts, blocks_per_pass, prompt_block
from reasonrec.recipes.decoding.sample import Sampler, noise, roll_out
from reasonrec.recipes.models.dropout import silence_dropout
from reasonrec.recipes.models.load import restore_trainable, trainable_values
from reasonrec.recipes.models.shards import together
from reasonrec.recipes.policies.base import install
from reasonrec.recipes.policies.loading import causal_lm
from reasonrec.recipes.trainers.advantages import by_token, permuted_rows, with_given
from reasonrec.recipes.trainers.algorithms import Algorithm
from reasonrec.recipes.trainers.best import keep_best
from reasonrec.recipes.trainers.chain_engines import chain_writer
from reasonrec.recipes.trainers.divergence import from_all
from reasonrec.recipes.trainers.groups import Pool, alive, choose, hinted, telemetry
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, save_weights
from reasonrec.recipes.trainers.quick import QuickTrainer
from reasonrec.recipes.trainers.refresh import KeepFresh
from reasonrec.recipes.trainers.scoring import Scorer, stand_in
from reasonrec.recipes.trainers.sequence_ratio import SequenceRatio
from reasonrec.tokenizers.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RolloutSettings:
    """What this trainer adds to GRPOConfig.

    Attributes:
        rounds: Rollout budget: at most so many times the prompts that are trained on.
        max_chain: Longest chain; 0 is direct mode.
        chain_engine: What writes chains: `own` for the sampler, or another engine (`chain_engines`).
        close_ids: What ends a chain.
        batch: Prompts rolled out at a time; it decides memory, not results.
        patience: Stop after so many probes without a better one; 0 for never.
        zero_reward_steps: Warn when all rewards were 0 for so many generation steps; 0 for never.
        stop_on_zero_rewards: Stop instead of warning.
        hint_weight: Groups that teach nothing are rolled out again behind the first codes of their target, whose
            supervised loss has this weight; 0 for no hints.
    """

    rounds: int = 3
    max_chain: int = 0
    chain_engine: str = "own"
    close_ids: tuple[int, ...] = ()
    batch: int = 64
    patience: int = 0
    zero_reward_steps: int = 20
    stop_on_zero_rewards: bool = False
    hint_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds} has to be at least 1")


Probe = Callable[["PreTrainedModel", int, int], Sequence[dict[str, float]]]


class ItemGRPOTrainer(QuickTrainer, SequenceRatio, GRPOTrainer):
    """Reinforcement learning of item recommendations.

    Args:
        prompts: Prompts with targets.
        scorer: Parses and scores rollouts.
        algorithm: How rewards become advantages.
        settings: What GRPOConfig does not say.
        probe: Ranks a share of fixed validation cases: (model, process, processes) to metrics of each case; the first
            metric selects.
        row_learning_rate: Learning rate of the code rows under PEFT; the others use `learning_rate`.
        **kwargs: `model`, `args`, `processing_class` and others that GRPOTrainer takes.

    Raises:
        UserError: If there are fewer prompts than one generation step trains on, or the policy takes no hints.
    """

    control: TrainerControl

    def __init__(
        self,
        *,
        prompts: RlPrompts,
        scorer: Scorer,
        algorithm: Algorithm,
        settings: RolloutSettings,
        probe: Probe | None = None,
        row_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        model, args = kwargs["model"], kwargs["args"]
        groups = args.generation_batch_size // args.num_generations
        if len(prompts) < groups:
            raise UserError(
                f"there are {len(prompts)} prompts, but a generation step trains on {groups}: lower "
                "per_device_train_batch_size or steps_per_generation, or min_history"
            )
        if settings.hint_weight and not scorer.policy.with_tree:
            raise UserError(
                f"hint_weight={settings.hint_weight:g} gives the first codes of an answer, and the policy "
                f"{scorer.policy.name} has none that are first: leave it out"
            )
        self._rounds = min(settings.rounds, len(prompts) // groups)
        self._settings, self._prompts, self._probe, self._algorithm = settings, prompts, probe, algorithm
        self._row_learning_rate = row_learning_rate
        self._zero_steps = 0
        self._chosen: Pool | None = None
        self._chosen_values = torch.empty(0)
        args.max_completion_length = settings.max_chain + len(settings.close_ids) + scorer.policy.answers.longest + 2
        args.reward_weights = list(scorer.rewards.weights)
        if probe is not None:
            args.eval_strategy, args.eval_on_start = type(args.eval_strategy)("steps"), True
            kwargs["eval_dataset"] = HfDataset.from_dict({"prompt": [""]})  # that there is one; `evaluate` is ours
        # TRL's loader drives the steps; what they are about follows from their number (`prompt_block`).
        steps = blocks_per_pass(len(prompts), groups * self._rounds) * groups
        start = trainable_values(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            super().__init__(
                reward_funcs=[stand_in(name) for name in scorer.rewards.names],
                train_dataset=HfDataset.from_dict({"prompt": [""] * steps}),
                rollout_func=self._replay,
                **kwargs,
            )
        self._scorer, self._policy = scorer, scorer.policy
        self._policy.answers.to(self.accelerator.device)
        restore_trainable(self.model, start)
        self._silenced = silence_dropout(*filter(None, (self.model, self.ref_model)))
        with torch.no_grad():
            self._copy_rows_to_reference()
        for policy in filter(None, (self._base(), self.ref_model)):
            lm = self.accelerator.unwrap_model(policy)
            install(lm, self._policy.answers, temperature=args.temperature, answers_only=True)

        self._chain_writer = chain_writer(settings.chain_engine, self)
        self._keep_fresh = KeepFresh(self._policy)
        self.add_callback(self._keep_fresh)

    create_optimizer = ItemSFTTrainer.create_optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.write_weights(output_dir or str(self.args.output_dir))

    def write_weights(self, folder: str | Path) -> None:
        """Save what was trained (`save_weights`), with the dropout that it was configured with.

        Args:
            folder: Where to.
        """
        with self._silenced.configured():
            save_weights(self.accelerator.unwrap_model(self.model), folder)

    def _base(self) -> Any:
        """The causal LM below DDP's and PEFT's wrappers."""
        return causal_lm(self.accelerator.unwrap_model(self.model))

    def _copy_rows_to_reference(self) -> None:
        """TRL copies what has `.default.` in its name; the code rows end in `.default` instead."""
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if name.endswith(".ref"):
                parameter.copy_(parameters[name.removesuffix(".ref") + ".default"])

    def _collect(self, wanted: int) -> Pool:
        """Roll out and score prompts until `wanted` groups teach something or the budget is spent.

        Args:
            wanted: Groups that all processes together train on.

        Returns:
            All groups of all processes, in the order of the data.
        """
        args, cycle = self.args, self._cycle
        block = prompt_block(len(self._prompts), wanted * self._rounds, cycle, args.seed)
        share = wanted // self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        pools: list[Pool] = []
        living = 0
        with self._sampling():
            if self._chain_writer is not None:
                self._chain_writer.update(self.state.global_step)
            for candidates in block.reshape(self._rounds, wanted):
                other = permuted_rows(wanted, 1, args.seed + cycle) if wanted > 1 else None
                targets = None if other is None else candidates[other][mine]
                pools.append(self._roll_out(candidates[mine], targets))
                living += int(self._lives(pools[-1]).sum())
                if living >= wanted:
                    break
        return Pool.join(pools)

    @property
    def _cycle(self) -> int:
        """Number of the generation step."""
        args = self.args
        return int(
            self.state.global_step
            * args.gradient_accumulation_steps
            // (args.steps_per_generation * self.num_iterations)
        )

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """The model is asked and not trained."""
        model = self._base()
        training = model.training
        model.eval()
        with torch.no_grad(), self.accelerator.autocast(), together(self.model):
            yield
        model.train(training)

    def _lives(self, pool: Pool) -> NDArray[np.bool_]:
        """Which groups teach something."""
        return alive(self._algorithm(pool.scores.total, pool.scores.hits), self.num_generations)

    def _hinted(self, pool: Pool) -> Pool:
        """Chosen groups, with hints for those that teach nothing about a target that is worth something."""
        dead, prompts, processes = ~self._lives(pool), self._prompts, self.accelerator.num_processes
        if prompts.rating is not None:
            dead = dead & (prompts.rating[pool.numbers] > 0)

        def answer(number: int) -> list[int]:
            return self._policy.prompts.answer(int(prompts.target[number]))

        def again(numbers: NDArray[np.int64], given: list[Sequence[int]]) -> Pool:
            mine = np.array_split(np.arange(len(numbers)), processes)[self.accelerator.process_index]
            return self._roll_out(numbers[mine], None, [given[i] for i in mine])

        with self._sampling():
            return hinted(pool, dead.nonzero()[0], answer, again, self._lives)

    def _roll_out(
        self,
        numbers: NDArray[np.int64],
        permuted: NDArray[np.int64] | None,
        given: Sequence[Sequence[int]] | None = None,
    ) -> Pool:
        """Roll out and score this process' prompts; what all processes found, or the error of any of them."""
        scorer, size, settings, model = self._scorer, self.num_generations, self._settings, self._base()
        sampler = Sampler(size, self.temperature, settings.max_chain, settings.close_ids, batch=settings.batch)

        def compute() -> Pool | None:
            if len(numbers) == 0:
                return None
            rollouts = roll_out(
                model,
                scorer.policy.answers,
                [self._prompts.token_ids(prompt) for prompt in numbers],
                sampler,
                eos_ids=self.eos_token_ids,
                pad_id=self._tokenizer.pad_token_id,
                noise=noise(
                    self.args.seed, self._cycle, numbers, size, sampler.max_chain + scorer.policy.answers.longest
                ),
                given=given,
                writer=self._chain_writer,
            )
            others = None if permuted is None else permuted.repeat(size)
            return Pool(numbers, rollouts, scorer(model, rollouts, self._prompts, numbers.repeat(size), others))

        try:
            return Pool.join(list(filter(None, from_all(compute))))
        except FloatingPointError as error:
            raise self.diverged(str(error), step=self.state.global_step + 1) from error

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out, choose groups, and let TRL make a batch of them."""
        size, world = self.num_generations, self.accelerator.num_processes
        wanted = len(inputs) * world // size
        pool = self._collect(wanted)
        scores = pool.scores
        advantage = self._algorithm(scores.total, scores.hits)
        chosen = choose(alive(advantage, size), wanted)
        permuted = self._algorithm(scores.permuted_total, scores.permuted_hits)
        for name, value in telemetry(pool, advantage, permuted, chosen, self._policy.answers.longest).items():
            self._metrics["train"][name].append(value)
        self._watch_zero_rewards(pool)
        pool = pool.take(chosen)
        if self._settings.hint_weight:
            pool = self._hinted(pool)
            self._metrics["train"]["rollouts/hinted"].append(float((pool.rollouts.given > 0).mean()))
        advantage = self._algorithm(pool.scores.total, pool.scores.hits)
        target = self._prompts.target[pool.numbers]
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        local = np.arange(len(pool.rollouts))[mine]
        rollouts = self._policy.optimised(pool.rollouts.take(local), target.repeat(size)[mine], target)
        self._chosen = Pool(pool.numbers, rollouts, pool.scores.take(local))
        device = self.accelerator.device
        self._chosen_values = torch.from_numpy(pool.scores.values).float().to(device)
        output = super()._generate_and_score_completions([{"prompt": ""} for _ in local])
        chain, answer = (torch.from_numpy(part[mine]).float() for part in self._algorithm.split(advantage))
        opened = (
            rollouts.opened(self._policy.answers.begin_id)
            if self._settings.max_chain
            else np.zeros(len(local), dtype=np.int64)
        )
        length = output["completion_ids"].shape[1]
        values = by_token(chain, answer, opened, length)
        if rollouts.given.any():
            values = with_given(values, rollouts.given, opened, self._settings.hint_weight, length)
        output["advantages"] = values.to(device)
        self._chosen = None
        return cast("dict[str, Any]", output)

    def _replay(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: the rollouts that were chosen."""
        assert self._chosen is not None
        rollouts = self._chosen.rollouts
        return {
            "prompt_ids": rollouts.prompt_ids,
            "completion_ids": rollouts.completion_ids,
            "logprobs": rollouts.log_probs,
            "env_mask": rollouts.mask,
        }

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        """The rewards of the chosen groups of all processes, which are known already."""
        return self._chosen_values

    def _watch_zero_rewards(self, pool: Pool) -> None:
        """Warn, or stop, when nothing has been rewarded for a while."""
        settings = self._settings
        self._zero_steps = 0 if np.nan_to_num(pool.scores.total).any() else self._zero_steps + 1
        if not settings.zero_reward_steps or self._zero_steps < settings.zero_reward_steps:
            return
        near = float((pool.scores.levels > 0).mean())
        cut = float(pool.rollouts.cut.mean())
        message = (
            f"all rewards were 0 in the last {self._zero_steps} generation steps (step {self.state.global_step}). "
            f"Likely causes: the model was not trained on these items (its first code is right in {near:.1%} of the "
            f"rollouts: run recipes/sft.py longer); only exact hits are rewarded (add rsvr: 1.0 to rewards); "
            f"{cut:.0%} of the chains are cut (raise max_chain); or a reward of your own never fires "
            "(python -m reasonrec.rewards check)"
        )
        if settings.stop_on_zero_rewards:
            raise UserError(message)
        if self._zero_steps == settings.zero_reward_steps and self.accelerator.is_main_process:
            warnings.warn(message, stacklevel=2)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Rank the probe's cases; keep the weights if they are the best so far, and stop if they have not been."""
        if self._probe is None:
            return {}
        base, processes, training = self._base(), self.accelerator.num_processes, self.model.training
        self.model.eval()
        self._keep_fresh.everything(self.model, self.state.global_step)  # not under autocast, as behind a checkpoint
        with together(self.model):
            with torch.no_grad(), self.accelerator.autocast():
                cases = gather_object(list(self._probe(base, self.accelerator.process_index, processes)))
            metrics = {f"eval_{name}": float(np.mean([case[name] for case in cases])) for name in cases[0]}
            selects = next(iter(metrics))
            history = {e["step"]: e[selects] for e in self.state.log_history if selects in e}
            history.pop(self.state.global_step, None)  # a resumed run probes its start once more
            if metrics[selects] > max(history.values(), default=-np.inf) and self.args.should_save:
                keep_best(Path(str(self.args.output_dir)), self.state.global_step, self.write_weights)
        history[self.state.global_step] = metrics[selects]
        best = max(history, key=lambda step: (history[step], -step))
        if self._settings.patience and sum(step > best for step in history) >= self._settings.patience:
            self.control.should_training_stop = True
        self.log(dict(metrics))
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
