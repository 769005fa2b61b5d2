"""Reinforcement learning with verifiable rewards: SRPO or plain GRPO, direct or with a chain of thought first.

accelerate launch recipes/grpo.py --config recipes/configs/demo/grpo.yaml

Starts from the folder that recipes/sft.py wrote and writes one of the same form. The prompts are positions of the
training sequences. An interrupted run goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal

from reasonrec.data_gen.tasks.rl_prompts import PromptWindow, RlPrompts
from reasonrec.recipes.args import build, parse, run
from reasonrec.recipes.trainers.keys import inherited
from reasonrec.rewards.registry import load_rewards, reward_files
from reasonrec.tokenizers.artefact import read_manifest, staged, write_json
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.places import place
from reasonrec.tokenizers.terminal import say


@dataclass
class GrpoStage:
    """What this stage adds to TRL's GRPOConfig."""

    model: str = field(
        metadata={"help": "folder of the model to start from (sft.py, or an earlier grpo.py)", "path": True}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "its dataset; where its training found it if unset", "path": True}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "its base model, if it moved since the training", "path": True}
    )
    index: str | None = field(
        default=None, metadata={"help": "item index, for rewards that read vectors of codes; as dataset", "path": True}
    )
    rewards: dict[str, Any] = field(
        default_factory=lambda: {"rsvr": 1.0},
        metadata={
            "help": "rewards by name or path/to/file.py:function, and their weights; 0 only logs",
            "path": "name",
        },
    )
    algorithm: str = field(default="srpo", metadata={"help": "advantages: srpo (bonus for exact hits), plain grpo …"})
    algorithm_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "its own options"})
    mode: Literal["direct", "reasoning"] = field(default="direct", metadata={"help": "item at once, or a chain first"})
    max_chain: int = field(default=128, metadata={"help": "longest chain in tokens, in reasoning mode", "at_least": 1})
    chain_engine: Literal["own", "generate", "vllm"] = field(default="own", metadata={"help": "what writes chains"})
    rollout_budget: int = field(
        default=3, metadata={"help": "roll out at most so many times the prompts trained on", "at_least": 1}
    )
    rollout_batch: int = field(
        default=64, metadata={"help": "prompts rolled out at a time: memory, not results", "at_least": 1}
    )
    hint_weight: float = field(
        default=0.0,
        metadata={"help": "loss of first codes given to prompts that teach nothing; 0: none", "at_least": 0},
    )
    min_history: int = field(default=1, metadata={"help": "fewest items in front of a target", "at_least": 0})
    last_targets: int | None = field(
        default=None, metadata={"help": "only the last positions of each sequence", "at_least": 1}
    )
    row_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of an adapter's code rows; learning_rate if unset", "at_least": 0},
    )
    valid_rows: int = field(
        default=200, metadata={"help": "validation cases ranked every eval_steps; 0 for none", "at_least": 0}
    )
    patience: int = field(
        default=0, metadata={"help": "stop after so many rankings without a better one; 0: never", "at_least": 0}
    )
    keep: Literal["best", "last"] = field(default="best", metadata={"help": "weights that are written"})
    zero_reward_steps: int = field(
        default=20, metadata={"help": "warn after so many steps of zero rewards; 0: never", "at_least": 0}
    )
    stop_on_zero_rewards: bool = field(default=False, metadata={"help": "stop then instead of warning"})
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})

    @property
    def chain(self) -> int:
        """Longest chain; 0 in direct mode."""
        return self.max_chain if self.mode == "reasoning" else 0


@releasing_outputs()
def main() -> None:
    """Parse, build, train, save."""
    stage, given = parse([GrpoStage, inherited("grpo")])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    from accelerate import PartialState

    from reasonrec.recipes.models.card import write_card
    from reasonrec.recipes.models.checkpoint import Setting, training_data, training_index
    from reasonrec.recipes.models.precision import load_finite
    from reasonrec.recipes.policies.base import check_rewards
    from reasonrec.recipes.policies.context import check_context
    from reasonrec.recipes.policies.loading import load_trained, save_checkpoint
    from reasonrec.recipes.trainers import resume
    from reasonrec.recipes.trainers.algorithms import build_algorithm
    from reasonrec.recipes.trainers.best import copy_best
    from reasonrec.recipes.trainers.chain_engines import check_chain_engine
    from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
    from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
    from reasonrec.recipes.trainers.scoring import build_scorer
    from reasonrec.recipes.trainers.validation import build_probe

    args = build(GrpoArguments, given)
    check_chain_engine(stage.chain_engine, stage.chain)
    state, trust = PartialState(), args.trust_remote_code
    out = claim_output(given["output_dir"], overwrite=stage.overwrite)
    rewards, scale = load_rewards(stage.rewards), args.scale_rewards != "none"
    algorithm = build_algorithm(stage.algorithm, stage.algorithm_options, args.num_generations, scale=scale)
    config = resume.stage_config(stage, args, out)
    start = read_manifest(stage.model)
    check_rewards(Setting.stored(start), rewards)
    dataset = training_data(start, stage.model, stage.dataset)
    index = training_index(start, stage.model, stage.index)
    with state.main_process_first():  # one process unpacks a packaged model, the others find it
        (policy, model, setting, start), precision = load_finite(
            lambda chosen: load_trained(
                stage.model, base_model=stage.base_model, precision=chosen, trainable=True, trust_remote_code=trust
            ),
            args.chosen,
            itemgetter(1),
            autocast=start.kind == "model",
        )
    precision.apply(args)
    check_context(model, policy, setting.max_history, trained=True, max_chain=stage.chain, end=1)
    config |= {"dataset": place(str(dataset.path), out), "base_model": place(setting.base_model, out)}
    config |= {"index": place(index, out)} if index else {}
    inputs = {n: start.inputs[n] for n in ("dataset", "index") if n in start.inputs} | {"model": start.hash}
    files = reward_files(stage.rewards)
    read = inputs | {f"reward {name}": value for name, value in files.items()}
    kind = "model" if setting.method == "full" else "adapter"
    about = {"kind": kind, "config": config, "seed": args.seed, "inputs": read, "overwrite": stage.overwrite}
    if resume.adopted(out, **about):
        return
    decisive = {"rewards": {"asked": stage.rewards, "files": files}, "base model's weights": setting.fingerprint}
    resume.keep_or_clear(out, config, inputs | decisive, precision)
    render = policy.prompts.reasoning if stage.chain else policy.prompts.direct
    set_order = dataset.facts["order"] == "set"
    window = PromptWindow(stage.min_history, stage.last_targets, setting.max_history)
    prompts = RlPrompts.from_train(dataset.train, window, render, set_order=set_order, seed=args.seed)
    work = resume.train_in(out, args)
    scorer = build_scorer(rewards, policy, dataset, reasoning=stage.chain > 0, index=index)
    trainer = ItemGRPOTrainer(
        prompts=prompts,
        scorer=scorer,
        algorithm=algorithm,
        settings=RolloutSettings(
            rounds=stage.rollout_budget,
            max_chain=stage.chain,
            chain_engine=stage.chain_engine,
            close_ids=policy.prompts.close_ids if stage.chain else (),
            batch=stage.rollout_batch,
            patience=stage.patience,
            zero_reward_steps=stage.zero_reward_steps,
            stop_on_zero_rewards=stage.stop_on_zero_rewards,
            hint_weight=stage.hint_weight,
        ),
        probe=build_probe(policy, dataset, stage.valid_rows, setting.max_history, stage.chain),
        row_learning_rate=stage.row_learning_rate,
        model=model,
        args=args,
        processing_class=policy.tokenizer,
    )
    if state.is_main_process:
        say(f"{len(prompts)} prompts, {args.num_generations} rollouts each, {state.num_processes} process(es)")
        say("\n".join(filter(None, [scorer.shortened(prompts), str(precision)])))
    result = resume.train_or_resume(trainer, out)
    if not state.is_main_process:
        return
    with staged(out, **about) as (folder, facts):
        chosen = copy_best(work, folder, trainer.state.log_history, "eval_ndcg@10") if stage.keep == "best" else None
        if chosen is None:
            chosen = trainer.state.global_step
            trainer.write_weights(folder)
        elif chosen == 0:
            say("no step ranks the validation cases better than the start: the start's weights are kept")
        reinforced = {"mode": stage.mode, "algorithm": stage.algorithm, "rewards": config["rewards"]}
        facts["reinforced"] = {**reinforced, "reward_files": files}
        facts.update(
            save_checkpoint(folder, setting, policy, current=chosen == trainer.state.global_step), step=chosen
        )
        measured = {"train": result.metrics | policy.measured(), "log": trainer.state.log_history}
        write_json(folder / "train_metrics.json", measured)
        write_card(folder, setting, policy, result.metrics)
        resume.keep_logs(out, folder)
    say(f"{out} holds the {kind} of step {chosen}: {', '.join(sorted(p.name for p in out.iterdir()))}")


if __name__ == "__main__":
    run(main)()
