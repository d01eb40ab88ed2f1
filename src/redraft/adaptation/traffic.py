"""A log of served responses in place of regeneration: split, written down as response files, generation cost zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redraft.adaptation.models import split_prompts
from redraft.adaptation.runs import Log
from redraft.artifact import atomic_write_bytes
from redraft.data.overlap import same_text, trained_conversations
from redraft.data.store import Row, encode_row
from redraft.data.traces import read_traces
from redraft.evaluate.speed import Prompt
from redraft.rows import anchors
from redraft.settings.runs import AdaptConfig, DistillConfig
from redraft.target import Target


@dataclass(frozen=True)
class Traffic:
    """Served responses by purpose; no prompt of one part is, or nearly is, an ``evaluation`` prompt of another.

    Each row of ``evaluation`` has a prompt of its own; its response shows what was served and is not trained on.
    """

    train: list[Row]
    heldout: list[Row]
    evaluation: list[Row]

    def prompts(self) -> list[Prompt]:
        """The evaluation prompts, token for token as they were served."""
        return [Prompt(row.id, row.prompt_ids) for row in self.evaluation]


def split_traffic(rows: Sequence[Row], target: Target, heldout: int, evaluation: int, seed: int) -> Traffic:
    """Split by the text of the prompts, so that several responses to one prompt stay together.

    ``heldout`` and ``evaluation`` count different prompts; of each evaluation prompt one response is kept. Raises
    ``UserError`` when too few different prompts are left to train on.
    """
    conversations = list(trained_conversations(rows, target.tokenizer))
    texts = {conversation.id: same_text(conversation) for conversation in conversations}
    parts = split_prompts(conversations, heldout, evaluation, seed)
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(texts[row.id], []).append(row)
    train, kept, measured = ([by_text[same_text(c)] for c in part] for part in parts)
    return Traffic(
        train=[row for group in train for row in group],
        heldout=[row for group in kept for row in group],
        evaluation=[group[0] for group in measured],
    )


def take_traffic(
    config: AdaptConfig | DistillConfig, target: Target, train_path: Path, heldout_path: Path, log: Log
) -> Traffic:
    """Read the log that the settings name and write its rows as response files, as regeneration would have.

    The same log gives the same files, so a killed run simply reads it again. The stage ``served traffic`` counts the
    time of reading and no tokens: the responses were paid for when they were served. Raises ``UserError``.
    """
    assert config.responses is not None
    with log.stage("served traffic") as entry:
        rows = read_traces(
            config.responses,
            target.tokenizer,
            target.content_hash(),
            eos_ids=target.eos_ids,
            vocab_size=target.vocab_size,
            max_new_tokens=config.max_new_tokens,
            context=target.context,
            warn=lambda text: log.say(f"note on {text}"),
        )
        # A response of one token has nothing that a draft could guess.
        found = split_traffic(
            list(filter(anchors, rows)), target, config.heldout_prompts, config.bench_prompts, config.seed
        )
        for path, part in ((train_path, found.train), (heldout_path, found.heldout)):
            data = b"".join(encode_row(row) for row in part)
            if not path.exists() or path.read_bytes() != data:
                atomic_write_bytes(path, data)
                entry.add(bytes_written=len(data))
    log.say(
        f"served traffic: {len(rows):,} responses; {len(found.train):,} to train on, {len(found.heldout):,} held out, "
        f"{len(found.evaluation):,} prompts to measure on; nothing was generated"
    )
    return found
