from redraft.drafts.proposing import Proposes


class Glue(Proposes):
    @property
    def taps(self):
        return tuple(self.config.taps)

    def check_fit(self, target):
        from redraft.drafts import base

        if self.family == "standalone":
            from redraft.loading import check_tokenizers

            check_tokenizers(self.tokenizer, target.tokenizer)
        base.check_fit(self.config, target)

    def bind(self, target):
        return self


class EagleGlue(Glue):
    grows_trees = True

    def proposer(self, target, capacity):
        from redraft.drafts.eagle.proposer import EagleProposer

        return EagleProposer(self, target, capacity)

    def static_proposer(self, target, capacity, gamma):
        from redraft.drafts.eagle.static import StaticProposer

        return StaticProposer(self, target, capacity, gamma)

    def walk(self, target):
        from redraft.drafts.eagle.walk import EagleWalk

        return EagleWalk(self, target)
