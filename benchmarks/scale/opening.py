"""What each command opens of its target, and how much memory that takes, beside the size of the target's file.

    python benchmarks/scale/opening.py [--old FOLDER]

makes a target of the Llama shape in bfloat16, 1.3 GB in six shards of which embedding, norm and head are a fifth, a
LoRA adapter on it, and an EAGLE-3 draft; then every command runs in a process of its own. Of each the highest resident
memory is read, less that of a process that imports the same modules and reads config and tokenizer, and divided by the
size of the target's files; mapped files count. ``opened`` says whether the model was built. With ``--old``, the ``src``
of an older version, all of it runs on that version too, in the same way. The server is a small one that answers by a
rule. The result is benchmarks/results/scale-opening.json; the command fails where a step that needs no model opens it.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import redraft
from redraft import provenance
from redraft.artifact import atomic_write_json
from redraft.drafts.eagle3 import fresh_draft
from redraft.drafts.files import save_draft
from redraft.loading import load_target, quiet
from redraft.progress import progress_bar

SCHEMA = "redraft.opening/1"
ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "scale-opening.json"
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}

BEGIN = """
import json, sys
from pathlib import Path
import redraft, safetensors.torch, peft, transformers.models.llama.modeling_llama
import redraft.adaptation.adapt, redraft.adaptation.distill, redraft.adaptation.merged_target, redraft.adaptation.core
import redraft.adaptation.estimate, redraft.adaptation.bench, redraft.adaptation.server_bench, redraft.api.steps
import redraft.api.runs, redraft.drafts.eagle3, redraft.drafts.eagle1, redraft.drafts.standalone
from redraft.adaptation.adapt import AdaptRun
from redraft.adaptation.models import TargetSpec
from redraft.loading import read_facts, targets
from redraft.settings.runs import AdaptConfig, DistillConfig
target, adapter, draft, prompts, rows, out, url, features = sys.argv[1:]
read_facts(target)
opened, load = [], targets.load_model
def counted(*args, **kwargs):
    opened.append(args[1])
    return load(*args, **kwargs)
targets.load_model = counted
spec = TargetSpec(target, "bfloat16")
quick = {"max_new_tokens": 12}
asked = {"prompts": prompts, "server": url, "server_model": "tiny", "max_new_tokens": 12, "dtype": "bfloat16"}
few = {"heldout_prompts": 4, "bench_prompts": 4, "bench_tokens": 8}
run = {"target": target, "draft": draft, "out": out} | few | asked
"""
END = """
high = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
Path(out).parent.joinpath("seen.json").write_text(json.dumps({"peak": high, "opened": len(opened)}))
"""
SERVED = "redraft.regenerate(spec, prompts, Path(out) / 'a.jsonl', server=url, server_model='tiny', **quick)"
UP_TO_FEATURES = """
job = AdaptRun(AdaptConfig(**run, {more}))
job.check(); job.source.write(); job.select()
"""
TRAIN = """
if features: __import__("shutil").copytree(features, Path(out) / "features")
redraft.train(spec, rows, out, draft=draft, method="lora", heldout=4, epochs=1, batch_anchors=64, dtype="bfloat16")
"""
# What is done, whether its target's model is needed, and how.
STEPS: dict[str, tuple[bool, str]] = {
    "nothing": (False, ""),
    "hash of the target": (False, "spec.facts().content_hash()"),
    "hash of an adapter's target": (False, "TargetSpec(adapter, 'bfloat16').facts().content_hash()"),
    "head of the target": (False, "spec.head('bfloat16')"),
    "dry run of adapt": (
        False,
        "from redraft.adaptation.estimate import plan\nplan(AdaptConfig(**{k: v for k, v in run.items()}))",
    ),
    "regenerate --server": (False, SERVED),
    "regenerate --server, an adapter": (False, SERVED.replace("spec", "TargetSpec(adapter, 'bfloat16')")),
    "adapt --server, up to features": (False, UP_TO_FEATURES.format(more="budget='50%', scorer='length'")),
    "adapt --server, prompts selected": (
        False,
        UP_TO_FEATURES.format(more="budget='50%', scorer='random', select_on='prompts'"),
    ),
    "select --prompts, a free scorer": (
        False,
        "redraft.select(Path(out) / 's.json', prompts=prompts, target=spec, scorer='length', budget='50%')",
    ),
    "distill --server, teacher tokens": (
        False,
        "[run.pop(name) for name in ('draft', 'bench_prompts', 'bench_tokens')]\n"
        "more = {'teacher': 'tokens', 'loss': 'kl', 'embeddings': 'random', 'text': [prompts], 'exports': ()}\n"
        "redraft.adaptation.distill.DistillRun(DistillConfig(**run, **more)).responses()",
    ),
    "bench --server": (
        False,
        "redraft.bench(spec, None, Path(out) / 'b.json', prompts=prompts, servers={'one': url}, limit=4, "
        "server_model='tiny', max_new_tokens=8)",
    ),
    "the draft by itself": (False, "redraft.adaptation.models.open_any(draft, read_facts(target))"),
    "check of a file": (False, "redraft.check(draft, spec)"),
    "import": (False, "redraft.import_draft(draft, Path(out) / 'd', target=spec)"),
    "export vllm": (False, "redraft.export(draft, spec, 'vllm', Path(out) / 'e')"),
    "train, features made": (True, TRAIN),
    "train, features stored": (False, TRAIN),
    "merge-target": (
        False,
        "redraft.adaptation.merged_target.merge_target_folder(adapter, None, Path(out) / 'whole')",
    ),
    "an adapter's target opened": (True, "targets.load_target(adapter, __import__('torch').bfloat16)"),
    "probe": (True, "redraft.probe(spec, draft, prompts, limit=4, max_new_tokens=8)"),
}


def make(place: Path) -> None:
    """Target, adapter, draft and prompts in ``place``."""
    words = runpy.run_path(str(ROOT / "tests" / "tiny_models.py"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(place / "target", max_shard_size="250MB")
    words["build_tokenizer"]().save_pretrained(place / "target")
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    joined = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in joined.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    joined.save_pretrained(place / "adapter")
    file = place / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(place / "target")}))
    del joined, model
    target = load_target(str(place / "target"), torch.bfloat16)
    save_draft(place / "draft", fresh_draft(target, range(4, 2004)).to(torch.bfloat16), {"method": "full"})
    prompts = [{"id": f"q{i}", "prompt": f"Question {i}: what is the sum of {i * 37} and {i * i}?"} for i in range(32)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


def step(name: str, src: Path, place: Path, url: str, features: str = "") -> dict[str, Any]:
    """Peak memory and openings of one step in a process of its own, or the line that it ended with."""
    out = place / "work" / "out"
    shutil.rmtree(place / "work", ignore_errors=True)
    out.parent.mkdir()
    if not name.startswith(("train", "adapt", "distill")):
        out.mkdir()
    names = ("target", "adapter", "draft", "prompts.jsonl", "rows.jsonl")
    words = [*(str(place / one) for one in names), str(out), url, features]
    known = {**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + STEPS[name][1] + END, *words],
        capture_output=True,
        text=True,
        env=known,
        cwd=place,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    found: dict[str, Any] = json.loads((place / "work" / "seen.json").read_text())
    return found


def measure(place: Path, versions: dict[str, Path]) -> tuple[list[dict[str, Any]], int]:
    with quiet():
        make(place)
    server = runpy.run_path(str(ROOT / "tests" / "unit" / "fake_server.py"))["FakeServer"]()
    size = sum(file.stat().st_size for file in (place / "target").glob("*.safetensors"))
    spec = redraft.TargetSpec(str(place / "target"), "bfloat16")
    redraft.regenerate(
        spec, place / "prompts.jsonl", place / "rows.jsonl", server=server.url, server_model="tiny", max_new_tokens=12
    )
    rows = compare(place, versions, server.url, size)
    server.stop()
    return rows, size


def compare(place: Path, versions: dict[str, Path], url: str, size: int) -> list[dict[str, Any]]:
    """All steps, each on every version."""
    rows: list[dict[str, Any]] = []
    nothing = {version: step("nothing", src, place, url)["peak"] for version, src in versions.items()}
    with progress_bar("opening", (len(STEPS) - 1) * len(versions), "steps") as progress:
        for name, (needs, _) in list(STEPS.items())[1:]:
            for version, src in versions.items():
                features = str(place / "features") if name == "train, features stored" else ""
                found = step(name, src, place, url, features)
                if name == "train, features made" and not (place / "features").exists():
                    shutil.copytree(place / "work" / "out" / "features", place / "features")
                row = {"version": version, "step": name, "needs_the_model": needs} | found
                if "peak" in found:
                    row["peak_bytes"] = row.pop("peak") - nothing[version]
                    row["of_target"] = round(row["peak_bytes"] / size, 3)
                rows.append(row)
                print(json.dumps(row), flush=True)
                progress.update(len(rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="the src folder of an older version")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    versions = {"this": Path(redraft.__file__).parents[1]} | ({"old": options.old} if options.old else {})
    with tempfile.TemporaryDirectory(prefix="redraft-opening-") as folder:
        rows, size = measure(Path(folder), versions)
    about = {"schema": SCHEMA, "target_bytes": size, "rows": rows, "provenance": provenance.collect(0, "cpu", {})}
    atomic_write_json(options.out, about)
    wrong = [row for row in rows if row["version"] == "this" and row.get("opened", 1) and not row["needs_the_model"]]
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
