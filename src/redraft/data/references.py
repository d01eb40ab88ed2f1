"""Public reference answers as training rows: off-policy text, to be compared with the target's own answers.

The published way to adapt a draft trains on the answers that come with a data set. They were written by people or
other models, so the draft learns to guess text that the target would not write; regeneration exists to avoid that.
These rows make the comparison possible: same prompts, same chat template, the data set's answers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from redraft.data.prompts import Conversation, Message, check_length, prompt_messages, template_ids
from redraft.data.store import REFERENCE, Failure, Row, row_key
from redraft.errors import UserError

__all__ = ["answer_ids", "continuation_ids", "reference_answers", "reference_rows"]

# What stands in the field where a sampled row has its temperature: anything but greedy.
UNKNOWN_TEMPERATURE = 1.0


def reference_rows(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    target_hash: str,
    *,
    eos_ids: Sequence[int] = (),
    max_new_tokens: int | None = None,
    context: int | None = None,
    failures: list[Failure] | None = None,
) -> list[Row]:
    """One row for every user turn, with the answer that stands behind it in the file; ``source`` is ``reference``.

    Turn by turn, as regeneration does it: the prompt of a later turn holds the reference answers to the earlier
    ones. Prompt and answer are what the target's chat template makes of them, the end token as it writes it.
    ``eos_ids`` are the target's end tokens (the tokenizer's own where none are given). Answers longer than
    ``max_new_tokens`` are cut there and finish with ``length``, as a regenerated one would; ``context`` is the
    longest sequence of the target. A later turn that no longer fits goes to ``failures`` where a list is given, with
    all turns behind it.

    Raises ``UserError`` that names the conversation: for a user turn without an answer, a prompt that does not fit,
    a template that cannot be followed, an id that is there twice.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            raise UserError(f"two conversations are called {conversation.id}; ids must differ")
        seen.add(conversation.id)
        answers = reference_answers(conversation)
        for turn, answer in enumerate(answers):
            asked = prompt_messages(conversation, answers[:turn])
            prompt, response, finish = answer_ids(tokenizer, conversation.id, asked, answer, eos_ids)
            try:
                check_length(conversation.id, len(prompt), max_new_tokens or len(response), context)
            except UserError as error:
                if turn == 0 or failures is None:
                    raise
                keys = [row_key(conversation.id, 0.0, later, REFERENCE) for later in range(turn, len(answers))]
                failures += [Failure(key, str(error)) for key in keys]
                break
            if max_new_tokens is not None and len(response) > max_new_tokens:
                response, finish = response[:max_new_tokens], "length"
            rows.append(
                Row(
                    id=conversation.id,
                    prompt_ids=prompt,
                    response_ids=response,
                    temperature=UNKNOWN_TEMPERATURE,
                    top_k=0,
                    top_p=1.0,
                    seed=0,
                    finish_reason=finish,
                    target_hash=target_hash,
                    turn=turn,
                    source=REFERENCE,
                )
            )
    return rows


def reference_answers(conversation: Conversation) -> list[str]:
    """The answer behind every user turn, in order.

    Raises ``UserError`` when a user turn has none, an empty one or two, or an answer stands before any question.
    """
    answers: list[str] = []
    role = "system"
    for message in conversation.messages:
        previous, role = role, message["role"]
        if role == "assistant":
            if previous != "user":
                raise UserError(f"conversation {conversation.id} has an assistant turn that answers no user turn")
            answers.append(message["content"])
        elif previous == "user":
            break
    users = sum(message["role"] == "user" for message in conversation.messages)
    if len(answers) < users or not all(answer.strip() for answer in answers):
        without = next((n for n, answer in enumerate(answers) if not answer.strip()), len(answers))
        raise UserError(
            f"conversation {conversation.id} has no reference answer to its user turn {without + 1}; remove that turn, "
            "or regenerate the answers"
        )
    return answers


def answer_ids(
    tokenizer: Any, id: str, asked: Sequence[Message], answer: str, eos_ids: Collection[int] = ()
) -> tuple[list[int], list[int], str]:
    """(prompt ids, response ids, finish reason) of an ``answer`` to the messages ``asked``, by the chat template.

    The response is what the template writes behind the opening of the assistant's turn, up to the first end token,
    which is kept (``stop``); where the template writes none, all of it (``length``). Raises ``UserError`` when the
    template cannot be followed for conversation ``id``.
    """
    prompt = template_ids(tokenizer, id, asked)
    ends = set(eos_ids) or {int(tokenizer.eos_token_id)}
    opened = _text(tokenizer, id, asked, True)
    whole = _text(tokenizer, id, [*asked, {"role": "assistant", "content": answer}], False)
    if not whole.startswith(opened):
        raise UserError(
            f"the chat template does not write the answer of conversation {id} behind its own opening of an "
            "assistant turn, so a reference answer cannot be placed; regenerate the answers"
        )
    response = continuation_ids(tokenizer, prompt, opened, whole[len(opened) :])
    end = next((place for place, token in enumerate(response) if token in ends), None)
    if end == 0 or not response:
        raise UserError(f"the answer in conversation {id} begins with an end token, so nothing of it is left")
    return (prompt, response, "length") if end is None else (prompt, response[: end + 1], "stop")


def continuation_ids(tokenizer: Any, prompt_ids: Sequence[int], prompt: str, text: str) -> list[int]:
    """Token ids of ``text`` where it follows ``prompt``, whose ids are ``prompt_ids`` (as it is, nothing added)."""
    joined = list(tokenizer(prompt + text, add_special_tokens=False).input_ids)
    if joined[: len(prompt_ids)] == list(prompt_ids):
        return joined[len(prompt_ids) :]
    # A token across the border: no engine that was sent the prompt would produce it.
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _text(tokenizer: Any, id: str, messages: Sequence[Message], opening: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening))
    except Exception as error:  # templates raise what they like
        raise UserError(f"the chat template refuses conversation {id}: {error}") from error
