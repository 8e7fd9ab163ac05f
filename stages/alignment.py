"""Stage 1, alignment: only the projector is trained, so that the decoder can use visual tokens."""

from torch import nn

from keye.model.keye import KeyeForConditionalGeneration
from stages.stage import LanguageStage


class Alignment(LanguageStage):
    name = "alignment"

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        """The projector trains, the tower and the decoder are frozen (report §pre-training, stage 1)."""
        model.requires_grad_(False)
        model.projector.requires_grad_(True)
        return model
