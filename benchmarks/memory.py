"""How much memory it takes to import, merge and export a draft, beside the size of its file.

    python benchmarks/memory.py

makes an EAGLE-3 draft for a target of 3 billion parameters as SpecForge writes it, half a gigabyte, and a private part
of low-rank updates on it. Then it is imported, merged, and written in every format that takes it, each in a process of
its own. Of each process the highest resident memory is read, less that of a process that imports the same modules and
opens the same target (with its tokenizer for ``gguf``, whose files hold one), and divided by the size of the file that
was read or, where that is larger, of the one that was written (``vllm`` ships the target's embedding). Memory of mapped
files counts. The result is benchmarks/results/memory.json; the command fails where a figure is above 1.3.

    python benchmarks/memory.py --large --out benchmarks/results/scale-memory.json

does the same with the draft of a target of 8 billion parameters, 0.85 GB. ``seconds`` are those of the step, without
the imports; ``copy_seconds`` those of a plain copy of the file that it reads, written through to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import redraft
from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.drafts.files import save_private
from redraft.drafts.groups import prepare
from redraft.drafts.opening import open_checkpoint
from redraft.errors import UserError
from redraft.progress import progress_bar
from redraft.registries import EXPORTERS
from redraft.settings.training import PrivateSize

SCHEMA = "redraft.memory/1"
ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
MOST = 1.3
LAYERS, HEADS, VOCABULARY, REDUCED = 8, 24, 128256, 32064
WIDTH, INNER = 3072, 8192
LARGE = {"WIDTH": 4096, "INNER": 14336, "HEADS": 32}
END = "<end>"

# What each process does; between the two marks nothing is counted but what the step takes.
STEP = """
import sys
import redraft
from redraft.loading import read_facts
import safetensors.torch, transformers.models.llama.modeling_llama
import redraft.adaptation.cards, redraft.drafts.eagle3, redraft.drafts.eagle1, redraft.drafts.standalone
from redraft.registries import EXPORTERS, FAMILIES
EXPORTERS.items(), FAMILIES.items()
step, target, draft, base, out = sys.argv[1:]
import time
if step != "gguf":
    facts = read_facts(target, tokenizer=step == "nothing with words")
began = time.perf_counter()
if step == "import":
    redraft.import_draft(draft, out, target=target)
elif step == "merge":
    redraft.merge(draft, base, out)
elif not step.startswith("nothing"):
    redraft.export(draft, target, step, out, base_draft=base or None)
print(time.perf_counter() - began)
# Not by getrusage, which counts what the process was forked from.
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that also a GGUF file can hold, with a merge for every token but the bytes and the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    merges = pairs + [(a + b, c) for a, b in pairs for c in letters][: VOCABULARY - len(letters) - len(pairs) - 1]
    words = [*letters, *(a + b for a, b in merges), END]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def make_target(folder: Path) -> None:
    """A target of the draft's width with layers that are hardly there."""
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = LlamaConfig(
        **shape, **heads, vocab_size=VOCABULARY, eos_token_id=VOCABULARY - 1, max_position_embeddings=2048
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def make_draft(folder: Path) -> None:
    """A draft in bfloat16 as SpecForge writes it: a reduced vocabulary, offsets and a mask."""
    head_dim, layer = WIDTH // HEADS, "midlayer."
    shapes = {
        "fc": (WIDTH, 3 * WIDTH),
        "lm_head": (REDUCED, WIDTH),
        layer + "self_attn.q_proj": (WIDTH, 2 * WIDTH),
        layer + "self_attn.k_proj": (8 * head_dim, 2 * WIDTH),
        layer + "self_attn.v_proj": (8 * head_dim, 2 * WIDTH),
        layer + "self_attn.o_proj": (WIDTH, WIDTH),
        layer + "mlp.gate_proj": (INNER, WIDTH),
        layer + "mlp.up_proj": (INNER, WIDTH),
        layer + "mlp.down_proj": (WIDTH, INNER),
    }
    norms = ("norm", *(layer + name for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")))
    state = {f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) / 64 for name, shape in shapes.items()}
    state |= {f"{name}.weight": torch.ones(WIDTH, dtype=torch.bfloat16) for name in norms}
    ids = torch.arange(REDUCED) * 4
    state |= {
        "d2t": ids - torch.arange(REDUCED),
        "t2d": torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True),
    }
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "draft_vocab_size": REDUCED,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def make_part(folder: Path, base: Path) -> None:
    """Low-rank updates on the draft's linears."""
    opened = open_checkpoint(str(base))
    adapted, names = prepare(opened.draft, "lora", PrivateSize(rank=8))
    with torch.no_grad():
        for name in names:
            adapted.get_parameter(name).normal_(std=0.01)
    adapted = adapted.to(torch.bfloat16)  # as runs store it
    save_private(folder, adapted, names, opened.base_hash, {"method": "lora", "target": {"name": "t", "hash": None}})


def steps(place: Path) -> Iterator[tuple[str, Path, Path | None]]:
    """(step, what it reads, the shared draft beside it)."""
    yield "import", place / "theirs", None
    yield "merge", place / "part", place / "own"
    for name in EXPORTERS.names():
        yield name, place / "own", None
    yield "vllm", place / "part", place / "own"


def peak(step: str, place: Path, draft: Path, base: Path | None, out: Path) -> tuple[int, float]:
    """Bytes of memory at the highest of a process that does the step, and the step's seconds.

    Raises ``UserError`` for what it refuses.
    """
    words = [step, str(place / "target"), str(draft), str(base or ""), str(out)]
    known = {**os.environ, "PYTHONPATH": str(Path(redraft.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", STEP, *words], capture_output=True, text=True, cwd=place, env=known)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    seconds, high = done.stdout.splitlines()[-2:]
    return int(high), float(seconds)


def copied(file: Path, out: Path) -> float:
    """Seconds of a plain copy of a file, until the disk has it."""
    began = time.perf_counter()
    with open(file, "rb") as source, open(out, "wb") as target:
        shutil.copyfileobj(source, target, 2**24)
        target.flush()
        os.fsync(target.fileno())
    out.unlink()
    return time.perf_counter() - began


def measure(place: Path) -> list[dict[str, Any]]:
    make_target(place / "target")
    make_draft(place / "theirs")
    redraft.import_draft(place / "theirs", place / "own", target=str(place / "target"))
    make_part(place / "part", place / "own")
    nothing = {
        held: peak(f"nothing{held}", place, place / "theirs", None, place / "none")[0] for held in ("", " with words")
    }
    todo, rows = list(steps(place)), []
    with progress_bar("memory", len(todo), "steps") as progress:
        for step, draft, base in todo:
            out = place / "out" / f"{step}-{draft.name}"
            whole = base or draft
            size = next(whole.glob("*.safetensors")).stat().st_size
            row: dict[str, Any] = {"step": step, "reads": draft.name, "file_bytes": size}
            try:
                high, seconds = peak(step, place, draft, base, out)
                more = high - nothing[" with words" if step == "gguf" else ""]
                written = sum(file.stat().st_size for file in out.iterdir())
                row |= {"written_bytes": written, "peak_bytes": more, "files": round(more / max(size, written), 3)}
                copy = copied(next(whole.glob("*.safetensors")), place / "copy")
                row |= {"seconds": round(seconds, 2), "copy_seconds": round(copy, 2)}
                shutil.rmtree(out)
            except UserError as error:
                row |= {"refused": str(error).rpartition("UserError: ")[2]}
            rows.append(row)
            progress.update(len(rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--large", action="store_true", help="the draft of a target of 8 billion parameters")
    options = parser.parse_args()
    if options.large:
        globals().update(LARGE)
    with tempfile.TemporaryDirectory(prefix="redraft-memory-") as folder:
        rows = measure(Path(folder))
    for row in rows:
        took = f"{row['seconds']:.1f} s, a copy {row['copy_seconds']:.1f} s" if "seconds" in row else ""
        print(f"{row['step']:>14} of {row['reads']:<7} {row.get('files', row.get('refused'))}  {took}")
    about = {"schema": SCHEMA, "most": MOST, "rows": rows, "provenance": provenance.collect(0, "cpu", {})}
    atomic_write_json(options.out, about)
    raise SystemExit(any(row.get("files", 0) > MOST for row in rows))


if __name__ == "__main__":
    main()
