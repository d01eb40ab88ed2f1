"""The GGUF file of an EAGLE-3 draft: what llama.cpp would compute from it is what the draft computes, or it is refused.

llama.cpp's graph is written once more here, in float64, from the file alone: numbers of a head turn in neighbouring
pairs, by frequencies divided by ``rope_freqs`` and scaled by ``attn_factor``; norms, residual, map as its model has
them. `make engines-check` asks the engine itself.
"""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

gguf = pytest.importorskip("gguf")

from redraft.drafts.eagle3.engines import meaning_of, read_as  # noqa: E402
from redraft.drafts.files import save_draft  # noqa: E402
from redraft.drafts.formats.meaning import TensorFacts, differences  # noqa: E402
from redraft.drafts.standalone import StandaloneDraft  # noqa: E402
from redraft.errors import UserError  # noqa: E402
from redraft.registries import EXPORTERS  # noqa: E402
from redraft.target import Facts, Target  # noqa: E402

HERE = Path(__file__).resolve().parent
SHARED = SimpleNamespace(**runpy.run_path(str(HERE / "export_families.py")))
TOKENIZERS = SimpleNamespace(**runpy.run_path(str(HERE / "test_standalone_exports.py")))
FAMILY, LLAMA3, YARN = SHARED.EAGLE3, SHARED.LLAMA3, SHARED.YARN
ROWS, STEPS = 300, 3
PARTIAL = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
TAKEN = {
    "bare": {},
    "full vocabulary": {"draft_vocab_size": ROWS},
    "norm before residual": {"norm_before_residual": True},
    "norm before fc": {"norm_before_fc": True},
    "own embedding": {"own_embedding": True},
    "narrow draft": {"hidden_size": 12, "own_embedding": True},
    "wide heads": {"head_dim": 10, "num_key_value_heads": 1},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "yarn rope": {"rope_parameters": YARN},
    "yarn rope with a scale": {"rope_parameters": YARN | {"attention_factor": 1.5}},
    "linear rope": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    "half of a head turns": {"rope_parameters": PARTIAL, "head_dim": 8},
    "half of a head turns slowly": {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}, "head_dim": 8},
    "a window that nothing exceeds": {"windows": (64,)},
    "the first and the last features": {"taps": (0, 4, 7)},
}
REFUSED = {
    "four features": ({"taps": (1, 3, 5, 7)}, "three features are needed, not 4"),
    "two features": ({"taps": (1, 3)}, "three features are needed, not 2"),
    "features of the last layer": ({"taps": (0, 4, 8)}, "after layers 0 to 7 only, not after 8"),
    "two layers": ({"num_layers": 2}, "one layer is computed, not 2"),
    "norms of queries": ({"qk_norm": True}, "qk_norm true is taken as false"),
    "a window": ({"windows": (16,)}, r"windows \[16\] is taken as \[0\]"),
    "biases": ({"attention_bias": True}, "attention_bias true is taken as false"),
    "an output bias": ({"output_bias": True}, "output_bias true is taken as false"),
    "a bias of fc": ({"fc_bias": True}, "no place for fc.bias"),
    "fc norm": ({"fc_norm": True}, "fc_norm true is taken as false"),
    "norm output": ({"norm_output": True}, "norm_output true is taken as false"),
    "no norm before the head": ({"head_norm": False}, "head_norm false is taken as true"),
}


@pytest.fixture
def target() -> Facts:
    known = SHARED.facts(vocab_size=ROWS)
    return Facts(known.name, known.whole_config, TOKENIZERS.byte_level_tokenizer())


def make(dtype: torch.dtype = torch.float32, **options):
    return replace(FAMILY, config=replace(FAMILY.config, target_vocab_size=ROWS)).make(dtype, **options)


def read_file(folder: Path):
    """Metadata and tensors in float64, rows first."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    tensors = {
        each.name: torch.frombuffer(bytearray(each.data.tobytes()), dtype=kinds[each.tensor_type.name]).view(
            [*reversed(each.shape.tolist())]
        )
        for each in reader.tensors
    }
    return told, tensors


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x_NAD, told, tensors):
    """llama.cpp's rotation of neighbouring pairs by position."""
    count, base = told["eagle3.rope.dimension_count"], told["eagle3.rope.freq_base"]
    frequencies = base ** (-torch.arange(0, count, 2, dtype=torch.float64) / count)
    frequencies = frequencies / tensors["rope_freqs.weight"].double() if "rope_freqs.weight" in tensors else frequencies
    angles = torch.arange(len(x_NAD), dtype=torch.float64)[:, None] * frequencies
    scale = told["eagle3.rope.scaling.attn_factor"]
    cos, sin = angles.cos()[:, None] * scale, angles.sin()[:, None] * scale
    even, odd, rest = x_NAD[..., 0:count:2], x_NAD[..., 1:count:2], x_NAD[..., count:]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return torch.cat([pairs, rest], -1)


def llamacpp(told, tensors, taps, embedding):
    """Logits [STEPS, N, V] of three draft steps over the same tokens, as its encoder and decoder compute them."""
    weights = {name.removesuffix(".weight"): each.double() for name, each in tensors.items() if name != "d2t"}
    eps, heads = told["eagle3.attention.layer_norm_rms_epsilon"], told["eagle3.attention.head_count"]
    keys, width = told["eagle3.attention.head_count_kv"], told["eagle3.attention.key_length"]
    if told["eagle3.norm_before_fc"]:
        taps = norm(taps, weights["enc.output_norm"], eps)
    state, table = taps @ weights["fc"].T, weights.get("token_embd", embedding)
    blk = {name.removeprefix("blk.0."): each for name, each in weights.items() if name.startswith("blk.0.")}
    found = []
    for _ in range(STEPS):
        held = norm(state, blk["attn_norm_2"], eps)
        x = torch.cat([norm(table, blk["attn_norm"], eps), held], -1)
        query, key = ((x @ blk[f"attn_{k}"].T).view(len(x), n, width) for k, n in (("q", heads), ("k", keys)))
        query, key = turned(query, told, tensors), turned(key, told, tensors)
        value = (x @ blk["attn_v"].T).view(len(x), keys, width)
        key, value = (each.repeat_interleave(heads // keys, 1) for each in (key, value))
        scores = torch.einsum("nad,mad->anm", query, key) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        mixed = torch.einsum("anm,mad->nad", scores.softmax(-1), value).flatten(-2) @ blk["attn_output"].T
        inner = mixed + (held if told["eagle3.norm_before_residual"] else state)
        y = norm(inner, blk["ffn_norm"], eps)
        gate = y @ blk["ffn_gate"].T
        state = (gate * gate.sigmoid() * (y @ blk["ffn_up"].T)) @ blk["ffn_down"].T + inner
        logits = norm(state, weights["output_norm"], eps) @ weights["output"].T
        whole = logits.new_full((len(x), len(told["tokenizer.ggml.tokens"])), -math.inf)
        ids = tensors["d2t"] if "d2t" in tensors else torch.arange(whole.shape[1])
        whole[:, ids] = logits
        found.append(whole)
    return torch.stack(found)


def ours(draft, taps, embedding):
    """The same of the draft itself."""
    tokens = torch.arange(len(taps))
    table = torch.nn.Embedding.from_pretrained(embedding.to(draft.fc.weight.dtype))
    embeds, state, found = draft.embed(tokens, table), draft.fuse(taps.to(draft.fc.weight.dtype)), []
    with torch.no_grad():
        for step in range(STEPS):
            state = draft(embeds, draft.carry(state) if step else state, tokens, [SHARED.attend])
            whole = torch.full((len(taps), ROWS), -math.inf, dtype=torch.float64)
            whole[:, draft.vocabulary()] = draft.logits(state).double()
            found.append(whole)
    return torch.stack(found)


@pytest.mark.parametrize("case", TAKEN)
def test_llamacpp_computes_what_the_draft_computes(case, target, tmp_path):
    draft = make(torch.float64, **TAKEN[case])
    stored = make(torch.float32, **TAKEN[case])
    EXPORTERS.get("gguf")(stored, tmp_path / "out", target)
    draft.load_state_dict(stored.state_dict())
    generator = torch.Generator().manual_seed(4)
    taps = torch.randn(7, 3 * 16, generator=generator, dtype=torch.float64)
    embedding = torch.randn(7, draft.config.hidden_size, generator=generator, dtype=torch.float64)
    told, tensors = read_file(tmp_path / "out")
    rows = tensors["token_embd.weight"][:7].double() if "token_embd.weight" in tensors else embedding
    theirs = llamacpp(told, {k: v for k, v in tensors.items() if k != "token_embd.weight"}, taps, rows)
    mine = ours(draft, taps, embedding)
    assert torch.equal(theirs.isinf(), mine.isinf())
    said = ~mine.isinf()
    assert said.any() and (theirs[said] - mine[said]).abs().max() < 1e-5


@pytest.mark.parametrize("case", REFUSED)
def test_what_llamacpp_does_not_compute_is_refused_by_name(case, target, tmp_path):
    options, words = REFUSED[case]
    SHARED.refused("gguf", tmp_path, make(**options), words, target)


@pytest.mark.parametrize("case", TAKEN)
def test_llamacpp_reads_the_file_as_the_draft_means_it(case, target, tmp_path):
    draft = make(torch.bfloat16, **TAKEN[case])
    report = EXPORTERS.get("gguf")(draft, tmp_path / "out", target, speculative_tokens=4)
    told, tensors = read_file(tmp_path / "out")
    facts = {n: TensorFacts(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    reading = read_as("llama.cpp", told, facts, target)
    assert not reading.stops and not reading.silent
    apart = {each.what for each in differences(meaning_of(draft.config), reading)}
    # A window that no text exceeds is none, and float32 holds the epsilon of a norm nearly.
    assert apart <= {"windows", "rms_norm_eps"}
    assert reading.meaning["rms_norm_eps"] == pytest.approx(draft.config.rms_norm_eps, rel=1e-6)
    assert told["eagle3.target_layers"] == told["eagle3.extract_layers"] == list(draft.config.taps)
    assert "--spec-type draft-eagle3" in report.serve and "--spec-draft-n-max 4" in report.serve
    kinds = {each.dtype for name, each in tensors.items() if each.ndim == 2}
    assert kinds == {torch.bfloat16} and tensors["output_norm.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda told, facts: told.pop("eagle3.target_layers"), "target_layers is not in the metadata"),
        (lambda told, facts: told.update({"eagle3.target_layers": [1, 2]}), "three features are needed, not 2"),
        (lambda told, facts: told.update({"eagle3.target_layers": [1, 2, 9]}), "after layers 0 to 7 only, not after 9"),
        (lambda told, facts: told.update({"eagle3.block_count": 2}), "one layer is computed, not 2"),
        (lambda told, facts: facts.pop("fc.weight"), "fc.weight is not in the file"),
        (lambda told, facts: facts.update({"fc.bias": TensorFacts("float32", (16,))}), "no place for fc.bias"),
        (lambda told, facts: facts.update({"d2t": TensorFacts("int32", (10,))}), "d2t is int32"),
        (lambda told, facts: told.update({"general.architecture": "llama"}), "reads GGUF files alone"),
    ],
)
def test_a_file_that_stops_llamacpp_is_told_of(spoil, words, target, tmp_path):
    EXPORTERS.get("gguf")(make(), tmp_path / "out", target)
    told, tensors = read_file(tmp_path / "out")
    facts = {n: TensorFacts(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    spoil(told, facts)
    assert any(words in why for why in read_as("llama.cpp", told, facts, target).stops)


def test_other_files_of_the_folder_and_unsound_drafts(target, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("1,2")
    with pytest.raises(UserError, match="holds other files"):
        EXPORTERS.get("gguf")(make(), tmp_path / "out", target)
    (tmp_path / "out" / "results.csv").unlink()
    (tmp_path / "out").rmdir()
    draft = make()
    draft.fc.weight.data[0, 0] = math.nan
    SHARED.refused("gguf", tmp_path, draft, "NaN", target)
    SHARED.refused("gguf", tmp_path, make(taps=(5, 4, 2)), "do not ascend strictly", target)
    SHARED.refused("gguf", tmp_path, make(), "has no tokenizer", SHARED.facts(vocab_size=ROWS))
    SHARED.refused("gguf", tmp_path, SHARED.EAGLE1.make(), "nor one of gguf")


def test_the_targets_own_file_gives_the_tokenizer(tiny_target, tmp_path):
    model = tiny_target("llama", num_hidden_layers=8, vocab_size=ROWS, hidden_size=16, num_attention_heads=1).model
    whole = Target(model, TOKENIZERS.byte_level_tokenizer(), name="tuned/target")
    EXPORTERS.get("gguf")(StandaloneDraft(whole.model, whole.tokenizer), tmp_path / "target", whole)
    whole.name = str(tmp_path / "target")
    report = EXPORTERS.get("gguf")(make(max_position_embeddings=whole.context), tmp_path / "out", whole)
    assert "copied from model.gguf" in report.warnings[-1]
    assert f"--model {tmp_path / 'target' / 'model.gguf'}" in report.serve


def test_the_command_reads_the_targets_tokenizer(tiny_target, tmp_path, redraft):
    model = tiny_target("llama", num_hidden_layers=8, vocab_size=ROWS, hidden_size=16, num_attention_heads=1).model
    whole = Target(model, TOKENIZERS.byte_level_tokenizer(), name="tuned/target")
    whole.save(tmp_path / "target")
    save_draft(tmp_path / "draft", make(max_position_embeddings=whole.context), {})
    words = f"export --draft {tmp_path}/draft --target {tmp_path}/target --format gguf --out {tmp_path}/out"
    code, _, error = redraft(words)
    assert code == 0, error
    assert (tmp_path / "out" / "model.gguf").exists()
    (tmp_path / "target" / "tokenizer.json").unlink()
    code, _, error = redraft(words + "2")
    assert code == 2 and "tokenizer" in error and not (tmp_path / "out2").exists()


def test_writing_makes_no_second_copy_of_the_weights(tmp_path):
    """In a process of its own, whose peak of memory says how much there was at once."""
    script = """
import json, resource, runpy, sys
import torch
from dataclasses import replace
test = runpy.run_path(sys.argv[1])
known = test["SHARED"].facts(vocab_size=test["ROWS"], hidden_size=1024)
target = test["Facts"](known.name, known.whole_config, test["TOKENIZERS"].byte_level_tokenizer())
wide = dict(hidden_size=1024, target_hidden_size=1024, intermediate_size=40960, head_dim=64)
draft = test["make"](**wide)
size = sum(p.numel() * p.element_size() for p in draft.parameters())
open("/proc/self/clear_refs", "w").write("5")
held = next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("VmRSS"))
test["EXPORTERS"].get("gguf")(draft, sys.argv[2], target)
peak = next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("VmHWM"))
print(json.dumps([size, peak - held]))
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of memory are read from Linux's /proc")
    command = [sys.executable, "-c", script, str(Path(__file__).resolve()), str(tmp_path / "out")]
    size, more = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert size > 300e6 and more < 0.3 * size
