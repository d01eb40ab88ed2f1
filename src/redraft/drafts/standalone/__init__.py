"""The family ``standalone``: a language model of its own that shares the target's tokenizer."""

from redraft.drafts.standalone.module import StandaloneConfig as StandaloneConfig
from redraft.drafts.standalone.module import StandaloneDraft as StandaloneDraft
from redraft.drafts.standalone.module import attach_experts as attach_experts
from redraft.drafts.standalone.module import check_fit as check_fit
from redraft.drafts.standalone.module import merge_experts as merge_experts
from redraft.drafts.standalone.module import untrained as untrained
