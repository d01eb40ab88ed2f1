"""The family ``eagle1``: a layer that predicts the target's next state (EAGLE, arXiv 2401.15077)."""

from redraft.drafts.eagle1.module import Eagle1Config as Eagle1Config
from redraft.drafts.eagle1.module import Eagle1Draft as Eagle1Draft
from redraft.drafts.eagle1.module import fresh_eagle1 as fresh_eagle1
