"""``none``: the stale draft as it is."""

from __future__ import annotations

from redraft.registries import STARTS
from redraft.starts.apply import Start, StartResult

STARTS.register("none")(
    Start(frozenset(), "the stale draft as it is", lambda draft, context: StartResult(draft), runs_target=False)
)
