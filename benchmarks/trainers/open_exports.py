"""Exports of redraft, opened by the package that they are for: does it compute what redraft computes?

    PYTHONPATH=<unpacked package> python open_exports.py CASES speculators|specforge|vllm

CASES is what ``exports.py`` wrote. Each folder is opened by the package's own loader (speculators' ``from_pretrained``,
the warm start of SpecForge's training, a vLLM engine with the target), and its logits over three draft steps are held
against ours; vLLM's are those of the last position, where it drafts. "equal": within 1e-5; "told": otherwise, as the
export's own notes said; "wrong": otherwise, and nothing was said. Exit status 1 where one is wrong, or where one is
equal of which it was said that it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
from safetensors.torch import load_file
from torch import Tensor

WITHIN = 1e-5


def speculators(folder: Path, ids: Tensor, taps: Tensor) -> Tensor:
    """By the package's ``from_pretrained`` and its own forward."""
    import make_speculators
    from speculators.model import SpeculatorModel

    model = SpeculatorModel.from_pretrained(str(folder / "checkpoint"), torch_dtype=torch.float32).eval()
    return make_speculators.forward(model, ids, taps)


def specforge(folder: Path, ids: Tensor, taps: Tensor) -> Tensor:
    """By the warm start of its training, then step by step as its training unrolls: own keys beside those of step 0."""
    from specforge.modeling.auto import AutoDraftModel
    from specforge.training.model_loading import load_draft_config_source, warm_start_draft_model

    config = load_draft_config_source(str(folder / "checkpoint"))
    model = AutoDraftModel.from_config(config, torch_dtype=torch.float32)
    warm_start_draft_model(
        model, str(folder / "checkpoint"), draft_config=config, strategy="eagle3", allow_missing_embedding=True
    )
    if not any("embed" in name for name in load_file(folder / "checkpoint" / "model.safetensors")):
        model.load_embedding(str(folder.parent / "target"))
    golden = load_file(folder / "golden.safetensors")
    found = torch.arange(config.draft_vocab_size) + model.d2t
    if not torch.equal(found, golden["vocabulary"]):
        raise ValueError("another vocabulary")
    length = len(taps)
    positions, cache = torch.arange(length)[None], [[], []]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    logits = []
    with torch.no_grad():
        states = model.project_hidden_states(taps[None])
        for step in range(common.STEPS):
            embeds = model.embed_input_ids(ids[1 + step : 1 + step + length][None])
            states = model.backbone(embeds, states, cache, mask, positions)
            logits.append(model.compute_logits(states)[0])
    return torch.stack(logits)


def vllm(folder: Path, ids: Tensor, taps: Tensor) -> Tensor:
    """By an engine in a process of its own, [3, 1, D]: it leaves no room for a second one."""
    out = folder / "vllm.safetensors"
    out.unlink(missing_ok=True)
    run = [sys.executable, __file__, str(folder), "in-vllm"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    told = subprocess.run(run, capture_output=True, text=True, env=environment)
    if not out.is_file():
        lines = [line for line in told.stderr.splitlines() if "Error" in line] or told.stderr.splitlines()
        raise RuntimeError(lines[-1] if lines else "no word")
    return load_file(out)["logits"]


def in_vllm(folder: Path) -> None:
    """The first proposal of an engine, with the case's features and tokens in the place of the engine's own."""
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    golden, logits = load_file(folder / "golden.safetensors"), list[Tensor]()
    ids, taps, length = golden["ids"], golden["taps"], len(golden["taps"])
    propose = SpecDecodeBaseProposer.propose

    def forced(self: Any, **given: Any) -> Tensor:
        tokens, following = given["target_token_ids"], given["next_token_ids"]
        # The engine's own trial runs have other tokens, and further rounds are not looked at.
        if logits or len(tokens) != length or not torch.equal(tokens.long(), ids[:length]):
            return propose(self, **given)
        compute = self.model.compute_logits

        def sample(states: Tensor, _sampling: Any) -> tuple[Tensor, None]:
            logits.append(compute(states)[:, golden["vocabulary"]].float())
            # What follows the last step is not looked at.
            return ids[min(length + len(logits), len(ids) - 1)].to(following.dtype)[None], None

        self._sample_draft_tokens = sample
        given["target_hidden_states"] = taps.to(given["target_hidden_states"])
        given["next_token_ids"] = ids[length : length + 1].to(following.dtype)
        try:
            return propose(self, **given)
        finally:
            del self._sample_draft_tokens

    SpecDecodeBaseProposer.propose = forced
    draft = {"model": str(folder / "checkpoint"), "method": "eagle3", "num_speculative_tokens": common.STEPS}
    engine = LLM(
        str(folder.parent / "target"),
        speculative_config=draft,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=6, detokenize=False, ignore_eos=True)
    engine.generate([{"prompt_token_ids": ids[:length].tolist()}], sampling)
    save_file({"logits": torch.stack(logits)}, folder / "vllm.safetensors")


PACKAGES = {
    "speculators": (("vllm",), speculators),
    "specforge": (("specforge",), specforge),
    "vllm": (("vllm", "plain"), vllm),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("package", choices=[*sorted(PACKAGES), "in-vllm"])
    options = parser.parse_args()
    if options.package == "in-vllm":
        return in_vllm(options.cases)
    formats, compute = PACKAGES[options.package]
    wrong, folders = 0, sorted(path for format in formats for path in options.cases.glob(f"redraft-{format}-*"))
    if not folders:
        sys.exit(f"{options.cases} holds no exports for {options.package}; write them with exports.py")
    for folder in folders:
        golden = SimpleNamespace(**load_file(folder / "golden.safetensors"))
        row: dict[str, Any] = {"case": folder.name, "package": options.package}
        try:
            found = compute(folder, golden.ids, golden.taps)
            row["largest_difference"] = float((found - golden.logits[:, -found.shape[1] :]).abs().max())
        except Exception as error:  # what the package makes of the file is the question here
            row |= {"largest_difference": None, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        notes = json.loads((folder / "case.json").read_text())["notes"]
        told = [note for note in notes if note.startswith(f"not for {options.package}")]
        equal = row["largest_difference"] is not None and row["largest_difference"] <= WITHIN
        verdict = "equal" if equal else "told" if told else "wrong"
        wrong += verdict == "wrong" or (equal and bool(told))
        print(verdict, json.dumps(row | {"told": told}), flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
