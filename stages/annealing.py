"""Stage 3, annealing: all parameters are trained at 16 times the context, with 8 times the RoPE base."""

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
