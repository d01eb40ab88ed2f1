"""The family ``eagle3``: one decoder layer over fused features of the target (EAGLE-3, arXiv 2503.01840)."""

from redraft.drafts.eagle3.module import Eagle3Config as Eagle3Config
from redraft.drafts.eagle3.module import Eagle3Draft as Eagle3Draft
from redraft.drafts.eagle3.module import fresh_draft as fresh_draft
