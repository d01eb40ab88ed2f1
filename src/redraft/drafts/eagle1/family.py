"""The family ``eagle1``, as the registry holds it."""

from redraft.drafts.base import Family
from redraft.drafts.eagle1.module import Eagle1Config, Eagle1Draft, fresh_eagle1
from redraft.drafts.eagle1.reading import ARCHITECTURES, kind_of, read
from redraft.drafts.eagle1.writing import WRITERS
from redraft.registries import FAMILIES

FAMILIES.register("eagle1")(
    Family(
        name="eagle1",
        build=lambda config: Eagle1Draft(Eagle1Config.from_dict(config)),
        fresh=lambda target, vocabulary, seed: fresh_eagle1(target, seed),
        recognises=lambda checkpoint: kind_of(checkpoint) is not None,
        architectures=tuple(ARCHITECTURES),
        read=read,
        writers=WRITERS,
        refusal="an Eagle1 draft reads the target's states and has no file that all engines load alike, nor one of "
        "{format}; export it for vllm or for sglang",
    )
)
