"""Stage 3, annealing: everything learns on a context sixteen times as long, with a RoPE base eight times as large."""

from torch import nn

from keye.model.keye import KeyeForConditionalGeneration
from stages.recipe import AnnealingRecipe
from stages.stage import LanguageStage


class Annealing(LanguageStage):
    name = "annealing"
    recipe: AnnealingRecipe

    def prepare(self, model: KeyeForConditionalGeneration) -> nn.Module:
        """Raise the RoPE base (report: 1e6 → 8e6); everything trains."""
        theta = model.config.text_config.rope_parameters["rope_theta"]
        model.set_rope_theta(theta * self.recipe.rope_scale)
        model.config.text_config.max_position_embeddings = max(
            model.config.text_config.max_position_embeddings, self.recipe.context
        )
        return model.requires_grad_(True)
