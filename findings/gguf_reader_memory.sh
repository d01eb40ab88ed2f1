#!/usr/bin/env bash
# gguf 0.19.0: reading a file's vocabulary takes more than sixty times the room that it has in the file.
#
# The reader keeps two memory-mapped arrays for every string of a list, its length and its bytes, each an object with a
# dictionary of its own. A vocabulary of 128,256 tokens, 2.5 MB in the file, takes 161 MB of memory before a token is
# asked for; merges, which a real vocabulary has besides, are strings as well. Opening such a file to look at one
# number, or to see whether it was written well, takes more than a small draft model does. Given plain arrays over the
# same map, the reader takes less than half.
#
# Seen on 2026-11-28 (numpy 2.4.6):
#   file 2.5 MB; memory of the reader 161 MB, with plain arrays 71 MB
# Exits 0 while the reader takes more than fifty times the file, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile gguf==0.19.0 numpy==2.4.6
cd "$work"
cat > write.py <<'PY'
import gguf

writer = gguf.GGUFWriter("words.gguf", "llama")
writer.add_token_list([f"<word {i}>".encode() for i in range(128256)])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
writer.close()
PY
cat > read.py <<'PY'
import sys

import gguf
import numpy


def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Plain(gguf.GGUFReader):
    """The same reader over a plain array."""

    @property
    def data(self):
        return self._plain

    @data.setter
    def data(self, value):
        self._plain = numpy.asarray(value)


before = resident()
reader = (Plain if sys.argv[1] == "plain" else gguf.GGUFReader)("words.gguf")
assert len(reader.fields["tokenizer.ggml.tokens"].data) == 128256
print(round(resident() - before))
PY
venv/bin/python write.py
size=$(stat -c %s words.gguf)
own=$(venv/bin/python read.py own)
plain=$(venv/bin/python read.py plain)
venv/bin/python -c "from importlib.metadata import version as v; print('gguf', v('gguf'), 'numpy', v('numpy'))"
echo "file $((size / 1000000)).$((size / 100000 % 10)) MB; memory of the reader $own MB, with plain arrays $plain MB"
[ "$own" -gt $((size / 1000000 * 50)) ] && [ "$((plain * 2))" -lt "$((own + own / 4))" ]
