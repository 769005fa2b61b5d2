"""Turn raw interactions into a dataset: read, clean, filter, split.

accelerate launch recipes/prepare.py --config recipes/configs/demo/prepare.yaml
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from reasonrec.data_gen.frames import spilling
from reasonrec.data_gen.preview import describe, preview
from reasonrec.data_gen.readers.base import READERS
from reasonrec.data_gen.rejected import keeping_rejected
from reasonrec.data_gen.schema import write_dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import OptionsOf, recorded
from reasonrec.tokenizers.artefact import file_hash, staged
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.terminal import say


@dataclass
class PrepareConfig:
    """What every source has; its own options stand beside its reader (`data_gen/readers/`)."""

    source: str = field(
        metadata={
            "help": "which reader: your own tables, a public data set, or the synthetic world",
            "one_of": READERS,
        }
    )
    output_dir: str = field(metadata={"help": "folder of the dataset", "path": "name"})
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir to <output_dir>.old"})
    preview: bool = field(default=False, metadata={"help": "show what would come out, and write nothing"})


KEYS = (PrepareConfig, OptionsOf("source", READERS))


@releasing_outputs()
def main() -> None:
    """Run the stage."""
    config, reader = parse(KEYS)
    if not is_first_process():  # nothing here is training: one process does it
        return
    if config.preview:
        say(preview(reader.read()[0]))
        return
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start = time.perf_counter()
    with ExitStack() as spilled, keeping_rejected(out) as rejected:
        spilled.enter_context(spilling(out))
        tables, files = reader.read()
        inputs = {role: file_hash(file) for role, file in files.items()}
        recipe = recorded(config, out) | recorded(reader, out)
        del recipe["preview"]  # nothing is written there
        about = {"config": recipe, "seed": recipe.get("seed", 0), "inputs": inputs}
        with staged(out, kind="dataset", overwrite=config.overwrite, **about) as (folder, facts):
            facts.update(write_dataset(folder, tables))
            spilled.close()  # before the dataset stands, so that a kill leaves nothing beside it
    if rejected.exists():
        say(f"{rejected} has the lines that could not be read")
    say(f"{describe(facts)}\n{out} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)()
