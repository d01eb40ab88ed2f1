"""The family ``standalone``, as the registry holds it."""

from redraft.drafts.base import Family
from redraft.drafts.standalone import folder
from redraft.drafts.standalone.gguf import GgufWriter
from redraft.drafts.standalone.module import build
from redraft.drafts.standalone.shapes import fresh_standalone
from redraft.registries import FAMILIES

FAMILIES.register("standalone")(
    Family(
        name="standalone",
        build=build,
        fresh=lambda target, vocabulary, seed: fresh_standalone(target, seed=seed),
        reads_states=False,
        weights_file=folder.WEIGHTS_FILE,
        other_files=folder.OTHER_FILES,
        other_bytes=folder.OTHER_BYTES,
        merges=True,
        write_beside=folder.write_beside,
        read_beside=folder.read_beside,
        check_usable=folder.check_usable,
        remarks=folder.remarks,
        recognises=folder.recognises,
        takes_any=True,
        read=folder.read,
        writers={"hf": folder.ModelWriter(), "gguf": GgufWriter()},
        refusal="{format} is for drafts that read the target's states; a standalone draft is a language model of its "
        "own, which every engine loads as hf; export hf",
    )
)
