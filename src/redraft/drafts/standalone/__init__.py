"""The family ``standalone``: a language model of its own that shares the target's tokenizer."""

from redraft.drafts.standalone.module import StandaloneConfig as StandaloneConfig
from redraft.drafts.standalone.module import StandaloneDraft as StandaloneDraft
from redraft.drafts.standalone.module import untrained as untrained
