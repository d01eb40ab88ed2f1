"""Public reference answers as training rows: off-policy text, to be compared with the target's own answers.

The published way to adapt a draft trains on the answers that come with a data set, which people or other models wrote.
These rows make the comparison possible: same prompts, same chat template, the data set's answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from redraft.data.answers import answer_ids
from redraft.data.prompts import check_length, prompt_messages, user_turns
from redraft.data.shapes import Conversation
from redraft.data.store import REFERENCE, UNKNOWN, Failure, Row, row_key
from redraft.data.turns import ASSISTANT, SYSTEM, USER, Message
from redraft.errors import UserError


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

    Turn by turn, as regeneration does it: the prompt of a later turn holds the reference answers to the earlier ones. A
    turn of ``weight`` 0 gives no row and stays in the prompts of later ones. ``eos_ids`` are the target's end tokens
    (the tokenizer's own where none are given). Answers longer than ``max_new_tokens`` are cut there and finish with
    ``length``, as a regenerated one would; ``context`` is the longest sequence of the target. A later turn that no
    longer fits goes to ``failures`` where a list is given, with all turns behind it.

    Raises ``UserError`` that names the conversation, as :func:`answer_ids` does, and for a user turn without an answer,
    a prompt that does not fit, an id that is there twice.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for conversation in conversations:
        if conversation.id in seen:
            raise UserError(f"two conversations are called {conversation.id}; ids must differ")
        seen.add(conversation.id)
        answers = reference_answers(conversation)
        for turn, answer in enumerate(answers):
            if answer.get("weight") == 0:
                continue  # a turn that is only there to be answered
            asked = prompt_messages(conversation, answers[:turn])
            prompt, response, finish = answer_ids(tokenizer, conversation.id, asked, answer, eos_ids)
            try:
                check_length(conversation.id, len(prompt), max_new_tokens or len(response), context)
            except UserError as error:
                if turn == 0 or failures is None:
                    raise
                keys = (row_key(conversation.id, 0.0, later, REFERENCE) for later in range(turn, len(answers)))
                failures += (Failure(key, str(error)) for key in keys)
                break
            if max_new_tokens is not None and len(response) > max_new_tokens:
                response, finish = response[:max_new_tokens], "length"
            found = prompt, response, UNKNOWN, finish, target_hash
            rows.append(Row.of(conversation.id, *found, turn=turn, source=REFERENCE))
    return rows


def reference_answers(conversation: Conversation) -> list[Message]:
    """The assistant's turn behind every user turn, in order.

    Raises ``UserError`` when a user turn has none, an empty one or two, or an answer stands behind no user turn.
    """
    answers: list[Message] = []
    role = SYSTEM
    for message in conversation.messages:
        previous, role = role, message["role"]
        if role == ASSISTANT:
            if previous != USER:
                raise UserError(f"conversation {conversation.id} has an assistant turn that answers no user turn")
            answers.append(message)
        elif previous == USER:
            break
    empty = [not answer["content"].strip() and "tool_calls" not in answer for answer in answers]
    without = [*empty, True].index(True)
    if without < user_turns(conversation):
        raise UserError(
            f"conversation {conversation.id} has no reference answer to its user turn {without + 1}; remove that turn, "
            "or regenerate the answers"
        )
    return answers
