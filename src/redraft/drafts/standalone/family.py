"""The family ``standalone``, as the registry holds it."""

from redraft.drafts.base import Family
from redraft.drafts.standalone.folder import OTHER_BYTES, OTHER_FILES, WEIGHTS_FILE, read_beside, write_beside
from redraft.drafts.standalone.gguf import GgufWriter
from redraft.drafts.standalone.module import build
from redraft.drafts.standalone.reading import check_usable, read, recognises
from redraft.drafts.standalone.shapes import fresh_standalone
from redraft.drafts.standalone.writing import ModelWriter
from redraft.registries import FAMILIES

FAMILIES.register("standalone")(
    Family(
        name="standalone",
        build=build,
        fresh=lambda target, vocabulary, seed: fresh_standalone(target, seed=seed),
        reads_states=False,
        weights_file=WEIGHTS_FILE,
        other_files=OTHER_FILES,
        other_bytes=OTHER_BYTES,
        merges=True,
        write_beside=write_beside,
        read_beside=read_beside,
        check_usable=check_usable,
        recognises=recognises,
        takes_any=True,
        read=read,
        writers={"hf": ModelWriter(), "gguf": GgufWriter()},
        refusal="{format} is for drafts that read the target's states; a standalone draft is a language model of its "
        "own, which every engine loads as hf; export hf",
    )
)
