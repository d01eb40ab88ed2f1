#!/usr/bin/env bash
# transformers 5.24.0: a date or a decimal in a chat reaches the model as "<date>" or "<Decimal>".
#
# apply_chat_template rebuilds everything that a template sees from plain JSON types; any other value is replaced by the
# name of its type in angle brackets, without an error and without a warning. That holds for the arguments of a tool
# call, for the fields of a message and for keyword arguments of apply_chat_template itself, functions included. So a
# tool call whose arguments come from a parsed record with dates and prices is rendered, and trained on, without them.
# json.dumps refuses the same values with a TypeError.
#
# Seen on 2026-11-27 (no torch needed):
#   arguments {"due": date(2026, 3, 14), "price": Decimal("19.99"), "tags": {"a"}}
#   rendered  {"due": "<date>", "price": "<Decimal>", "tags": "<set>"}
#   keyword argument today=date(2026, 3, 14):  <date>;  a function:  <function>
# Exits 0 while that is so, 1 once it is not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
import logging
import sys
import warnings
from datetime import date
from decimal import Decimal

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

print("transformers", transformers.__version__)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, "?")), unk_token="?")
tokenizer.chat_template = (
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "|{{ today }}|{{ clock }}"
)
arguments = {"due": date(2026, 3, 14), "price": Decimal("19.99"), "tags": {"a"}}
call = {"type": "function", "function": {"name": "pay", "arguments": arguments}}
said = []


class Listener(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("transformers").addHandler(Listener())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    text = tokenizer.apply_chat_template(
        [{"role": "assistant", "content": "", "tool_calls": [call]}],
        tokenize=False,
        today=date(2026, 3, 14),
        clock=lambda form: "now",
    )
said += [str(warning.message) for warning in caught]
print("rendered:", text)
print("said:", said)
rendered, today, clock = text.split("|")
try:
    json.dumps(arguments)
    refused = False
except TypeError as error:
    refused = True
    print("json.dumps: TypeError:", error)
wanted = {"due": "<date>", "price": "<Decimal>", "tags": "<set>"}
as_seen = json.loads(rendered) == wanted and (today, clock) == ("<date>", "<function>") and refused and not said
print("as seen on 2026-11-27" if as_seen else "CHANGED since 2026-11-27")
sys.exit(0 if as_seen else 1)
EOF
