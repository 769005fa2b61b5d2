"""Align a pre-trained LLM with the items and how people use them: full fine-tuning, LoRA, or LoRA on a 4-bit base.

accelerate launch recipes/sft.py --config recipes/configs/demo/sft.yaml

An interrupted run goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.choice import TaskChoice, validation_examples
from reasonrec.data_gen.tasks.curriculum import parse_phases, plot_plan
from reasonrec.data_gen.tasks.mixture import check_texts
from reasonrec.data_gen.tasks.prompts import HISTORY, check_history_prompt
from reasonrec.recipes.args import build, parse, run
from reasonrec.recipes.trainers.keys import inherited
from reasonrec.tokenizers.artefact import check_input, staged, write_json
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.places import place
from reasonrec.tokenizers.terminal import say


@dataclass(kw_only=True)
class SftStage(TaskChoice):
    """What this stage adds to TRL's SFTConfig."""

    dataset: str = field(metadata={"help": "dataset folder (prepare.py)", "path": True})
    model: str = field(
        metadata={
            "help": "base model (Hub id, folder, or package:NAME for one inside an installed package), or the folder "
            "of an earlier training to go on from",
            "path": True,
        }
    )
    index: str | None = field(
        default=None,
        metadata={"help": "item index folder (index_items.py), for policies whose items are codes", "path": True},
    )
    policy: str = field(default="semantic_id", metadata={"help": "how the model reads and answers"})
    policy_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the policy's own options"})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "when going on: the adapter's base model (Hub id or folder), if it moved since the training",
            "path": True,
        },
    )
    method: Literal["full", "lora", "qlora"] = field(
        default="qlora", metadata={"help": "full, lora, or qlora (LoRA on a 4-bit NF4 base)"}
    )
    history_prompt: str = field(default=HISTORY, metadata={"help": "prompt with the place {history}"})
    chat: bool = field(default=False, metadata={"help": "put prompts into the model's chat template"})
    system: str | None = field(default=None, metadata={"help": "system message of the chat template"})
    layers: int | None = field(
        default=None,
        metadata={"help": "use only the first so many layers of the base model; all if unset", "at_least": 1},
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank", "at_least": 1})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scaling", "at_least": 1})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout", "at_least": 0, "below": 1})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "all-linear, or names joined by commas"})
    row_learning_rate: float | None = field(
        default=None,
        metadata={"help": "learning rate of the code rows under LoRA; learning_rate if unset", "at_least": 0},
    )
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})
    valid_rows: int = field(
        default=0, metadata={"help": "validation cases whose loss is reported; 0 for none", "at_least": 0}
    )
    trial: str | None = field(
        default=None, metadata={"help": "of doctor.py: try three steps, write here what they take", "path": True}
    )

    def __post_init__(self) -> None:
        check_history_prompt(self.history_prompt)
        self.check_tasks()
        if self.method == "full" and self.row_learning_rate is not None:
            raise UserError(
                "row_learning_rate is for lora and qlora; with method=full all rows train at learning_rate"
            )


@releasing_outputs()
def main() -> None:
    """Parse, build, train, save."""
    stage, given = parse([SftStage, inherited("sft")])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    import torch
    from accelerate import PartialState
    from datasets import Dataset as HfDataset

    from reasonrec.recipes.models.card import write_card
    from reasonrec.recipes.models.checkpoint import OTHER, Setting, trained_tokenizer
    from reasonrec.recipes.policies.base import build_policy, check_index
    from reasonrec.recipes.policies.context import check_context
    from reasonrec.recipes.policies.loading import save_checkpoint
    from reasonrec.recipes.trainers import resume
    from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments, planned, save_weights
    from reasonrec.recipes.trainers.soft_targets import SoftTargets
    from reasonrec.recipes.trainers.start import agreed_setting, earlier_training, load_start
    from reasonrec.recipes.trainers.trial import trial

    args = build(SftArguments, given)
    if (stage.valid_rows > 0) != (args.eval_strategy != "no"):
        raise UserError(
            f"valid_rows={stage.valid_rows} and eval_strategy={args.eval_strategy} go together: set both to have the "
            "validation loss reported, such as --valid_rows 500 --eval_strategy steps --eval_steps 100"
        )
    state = PartialState()
    out = claim_output(given["output_dir"], overwrite=stage.overwrite)
    config = resume.stage_config(stage, args, out)
    asked = Setting(
        stage.model, stage.method, stage.history_prompt, stage.chat, stage.system, stage.max_history,
        stage.one_per_prefix, policy=stage.policy, policy_options=stage.policy_options, layers=stage.layers,
    )  # fmt: skip
    earlier = earlier_training(stage.model)
    setting, trust = agreed_setting(asked, vars(stage), earlier), args.trust_remote_code
    soft = SoftTargets.parse(stage.soft_targets, setting.policy)
    with state.main_process_first():  # one process unpacks a packaged model, the others find it
        tokenizer = None if earlier is None else trained_tokenizer(stage.model, earlier, setting, trust)
        dataset, index = Dataset.load(stage.dataset), check_index(setting, stage.index)
        made = {"dataset": dataset.manifest} | ({"index": index.manifest} if index and index.manifest else {})
        for name, manifest in made.items():
            if earlier is not None:
                check_input(earlier, name, manifest, OTHER)
        policy = build_policy(dataset.catalogue(index), setting, tokenizer, trust_remote_code=trust)
        sequences = dataset.sequences
    made |= {} if earlier is None else {"model": earlier}
    inputs = {name: manifest.hash for name, manifest in made.items()}
    if (traces := stage.load_traces(dataset.manifest)) is not None:
        inputs["traces"] = traces.manifest.hash
    kind = "model" if stage.method == "full" else "adapter"
    config["base_model"] = place(setting.base_model, out)
    about = {"kind": kind, "config": config, "seed": args.seed, "inputs": inputs, "overwrite": stage.overwrite}
    if resume.adopted(out, **about):
        return
    examples = policy.examples(
        sequences,
        one_per_prefix=stage.one_per_prefix,
        traces=traces.train if traces else (),
        mention=stage.mention,
        set_order=dataset.facts["order"] == "set",
    )
    plan = stage.plan(
        examples,
        passes=args.num_train_epochs,
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * state.num_processes,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    torch.manual_seed(args.seed)
    model, setting, precision = load_start(stage, setting, policy, earlier, args.chosen, trust_remote_code=trust)
    resume.keep_or_clear(out, config, inputs | {"base model's weights": setting.fingerprint}, precision)
    precision.apply(args)
    limit = check_context(model, policy, stage.max_history, trained=False)
    check_texts(plan, examples, limit)
    taught = soft.prepare(dataset, policy, examples, plan, out, args.seed) if soft else None
    valid = validation_examples(examples, dataset, stage.valid_rows, stage.max_history)
    args.num_train_epochs = 1
    resume.train_in(out, args)
    trainer = ItemSFTTrainer(
        policy=policy,
        row_learning_rate=stage.row_learning_rate,
        taught=taught,
        model=model,
        args=args,
        train_dataset=planned(plan, taught.examples if taught else examples),
        eval_dataset=HfDataset.from_dict(valid) if stage.valid_rows else None,
        processing_class=policy.tokenizer,
    )
    if state.is_main_process:
        say(f"{trainer.amount}\n{precision}")
    if stage.trial:
        write_json(Path(stage.trial), vars(trial(trainer)))
        return
    result = resume.train_or_resume(trainer, out)
    if not state.is_main_process:
        return
    with staged(out, **about) as (folder, facts):
        save_weights(trainer.model, folder)
        facts.update(save_checkpoint(folder, setting, policy))
        measured = {"train": result.metrics | policy.measured(), "log": trainer.state.log_history}
        write_json(folder / "train_metrics.json", measured)
        write_card(folder, setting, policy, result.metrics)
        if stage.curriculum:
            plot_plan(plan, parse_phases(stage.curriculum), folder / "curriculum.png")
        resume.keep_logs(out, folder)
    say(f"{out} holds the {kind}: {', '.join(sorted(p.name for p in Path(out).iterdir() if p.is_file()))}")


if __name__ == "__main__":
    run(main)()
