"""The family ``eagle3``, as the registry holds it."""

from __future__ import annotations

from functools import partial

from redraft.drafts.base import Family
from redraft.drafts.eagle3.engines import READERS, meaning_of, read_as
from redraft.drafts.eagle3.gguf import GgufWriter
from redraft.drafts.eagle3.module import Eagle3Config, Eagle3Draft, fresh_draft
from redraft.drafts.eagle3.reading import ARCHITECTURES, check_state, read, recognises
from redraft.drafts.eagle3.suspects import suspects
from redraft.drafts.eagle3.writing import WRITERS
from redraft.registries import FAMILIES

FAMILIES.register("eagle3")(
    Family(
        name="eagle3",
        build=lambda config: Eagle3Draft.untrained(Eagle3Config.from_dict(config)),
        fresh=fresh_draft,
        recognises=recognises,
        architectures=ARCHITECTURES,
        read=read,
        options=("taps", "trainer"),
        check_state=check_state,
        suspects=suspects,
        meaning=meaning_of,
        readers={engine: partial(read_as, engine) for engine in READERS},
        writers=WRITERS | {"gguf": GgufWriter("gguf", "draft-eagle3", ("llama.cpp",))},
        refusal="this draft reads the target's states and is no language model, which {format} is for: transformers "
        "takes language models alone as assistants; export it for vllm, sglang or gguf",
    )
)
