"""What makes acceptance low: every cause that the check tells apart, how it shows, and the command that mends it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """``words`` say what is wrong, ``shows`` how that was told, ``mend`` what to do: text with fields in braces, which
    :meth:`mended` fills (``draft``, ``target``, ``base``, ``prompts``, ``option``, ``gamma``, ``server``,
    ``format``)."""

    id: str
    words: str
    shows: str
    mend: str

    def mended(self, **known: str) -> str:
        """The command that mends it. Fields that nobody knows stand as words in capitals."""
        names = ("draft", "target", "base", "prompts", "option", "gamma", "server", "format")
        return " ".join(self.mend.format(**{name: known.get(name) or name.upper() for name in names}).split())


IMPORT = "redraft import {draft} --target {target} {option} --out mended, then export and serve that folder"
ADAPT = "redraft adapt --draft {draft} --target {target} --prompts {prompts} --out run"
EXPORT = "redraft export --draft {draft} --target {target} --format {format} --out exported"
SERVED = "give the engine the folder that this writes: " + EXPORT
READS_NONE = "go on training there from its own checkpoint; what it exports itself for engines is written by: " + EXPORT

TABLE = (
    # -- the file, or the engine's reading of it
    Cause(
        "layers_off_by_one",
        "the draft is fed the states of layers one off from those that it was trained on",
        "with every layer one higher, or one lower, more is accepted",
        IMPORT,
    ),
    Cause(
        "layers_in_other_order",
        "the draft is fed the states of the right layers in the wrong order",
        "with the same layers in another order more is accepted",
        IMPORT,
    ),
    Cause(
        "other_layers",
        "the draft is fed the states of other layers than it was trained on",
        "with the usual layers more is accepted",
        IMPORT,
    ),
    Cause(
        "norm_missing",
        "a norm that the draft was trained with is left out",
        "with that norm more is accepted; of a server: without it our rates become the server's",
        EXPORT,
    ),
    Cause(
        "norm_extra",
        "a norm is applied that the draft was trained without",
        "without that norm more is accepted; of a server: with it our rates become the server's",
        EXPORT,
    ),
    Cause(
        "norm_doubled",
        "a norm is applied twice on one side and once on the other",
        "with the norm twice more is accepted; of a server: our rates become the server's",
        ADAPT + " (no engine applies it twice; where the engine does, export again)",
    ),
    Cause(
        "norm_side",
        "a state is taken on the wrong side of a norm",
        "on the other side of the norm more is accepted; of a server: our rates become the server's",
        EXPORT,
    ),
    Cause(
        "map_scrambled",
        "the rows of the draft's head stand for other tokens than its vocabulary map says",
        "with another map more is accepted",
        "put d2t and t2d of the training that wrote the head's rows into the folder, then redraft import {draft} "
        "--target {target} --out mended; where they are lost, " + ADAPT,
    ),
    Cause(
        "rope_lost",
        "the draft's rotary angles are not those that it was trained with",
        "with other angles more is accepted",
        "write rope_theta and rope_scaling of the training into config.json, then " + IMPORT,
    ),
    Cause(
        "window_lost",
        "a sliding window of the draft is read as none",
        "our rates without the window are the server's",
        SERVED,
    ),
    Cause(
        "embedding_replaced",
        "another embedding is used than the draft was trained with",
        "with the other embedding more is accepted; of a server: our rates become the server's",
        SERVED,
    ),
    Cause(
        "misread",
        "the engine reads the file in another way than its trainer wrote it",
        "the two readings of the file, side by side",
        SERVED,
    ),
    Cause(
        "refused",
        "the engine does not load this file",
        "the engine's own reasons to stop",
        SERVED,
    ),
    # -- the pair
    Cause(
        "other_tokenizer",
        "draft, target and server do not share one tokenizer",
        "hashes of the tokenizers, sizes of the vocabularies, or the ids that a server makes of a text",
        "find the draft made for the tokenizer of {target}; no setting mends it",
    ),
    Cause(
        "base_teacher",
        "the draft was trained for this target by its name, but taught by the base model",
        "its file names this target, and yet more is accepted on the base model's own answers",
        ADAPT + " (the teacher is always the target itself)",
    ),
    Cause(
        "stale",
        "the draft is read as it was trained, and was trained for another model: it is stale",
        "nothing that is changed helps, and on the model that it was made for more is accepted",
        ADAPT,
    ),
    Cause(
        "other_text",
        "the draft was trained on text unlike these prompts",
        "its record states more for this very target than these prompts give",
        ADAPT + " (with prompts like those that are served)",
    ),
    Cause(
        "vocabulary",
        "the draft cannot say many of the target's tokens",
        "the share of the target's answers that its vocabulary covers, and the tau that this caps",
        ADAPT + " (it refreshes the vocabulary first)",
    ),
    # -- the text
    Cause(
        "bos_doubled",
        "the server puts the beginning-of-text token in front of prompts that have it already",
        "the server counts a prompt token more than the template makes",
        "send token ids or messages, not rendered text; or switch off add_special_tokens at {server}",
    ),
    Cause(
        "template_doubled",
        "the chat template is applied twice",
        "the server counts as many prompt tokens as the template makes of its own output",
        "send messages to the chat endpoint and rendered text to the other one, never rendered text as a message",
    ),
    Cause(
        "other_template",
        "the server's chat template makes other prompts than the target's",
        "the server counts other prompt tokens for the same messages",
        "serve with the target's own chat template and arguments (--chat-template, chat_template_kwargs), or name the "
        "server's with --template-arg; where the template is meant, " + ADAPT,
    ),
    Cause(
        "prompt_changed",
        "the server changes the prompts: it adds tokens or cuts them",
        "the server counts other prompt tokens than it was sent",
        "switch off whatever adds to prompts or cuts them at {server}",
    ),
    # -- the engine
    Cause(
        "target_quantised",
        "the served target is not computed as the target at hand: its weights, cache or activations are rounded",
        "its answers leave ours where ours is sure of the token, now and then",
        "serve the target in the type that the draft was trained on, or align the draft with what is served: "
        "redraft adapt --draft {draft} --target {target} --server {server} --prompts {prompts} --out run",
    ),
    Cause(
        "other_target",
        "the server runs another model than the target at hand",
        "its answers leave ours at once and go on otherwise",
        "serve {target}, or name the served model with --target",
    ),
    Cause(
        "short_context",
        "the engine, or the draft, loses the thread behind a position: its context is short",
        "acceptance by position in the text: fine at first, then falling off",
        "serve with a longer context for the draft (max_model_len, max_position_embeddings), or train on long texts: "
        + ADAPT,
    ),
    Cause(
        "engine_limit",
        "the engine drafts less than it was asked to",
        "the server's counters: fewer drafted tokens a round, or tokens that no round made",
        "serve with num_speculative_tokens {gamma} and no limit below it (batch size, draft confidence, max_num_seqs)",
    ),
    Cause(
        "too_long_drafts",
        "drafts are longer than the draft was trained for",
        "acceptance of the late positions falls off from that of the early ones",
        "serve with num_speculative_tokens {gamma}, or train further steps: " + ADAPT,
    ),
    Cause(
        "engine_lower",
        "the server accepts less than the same draft does here, and nothing that was tried explains it",
        "acceptance by position here and there",
        "compare the engine's own log with redraft check --for ENGINE; " + EXPORT,
    ),
)
CAUSES = {cause.id: cause for cause in TABLE}

NOTHING = "nothing wrong found"
