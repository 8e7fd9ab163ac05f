"""Stage 2, multi-task: all parameters are trained on captions, questions, grounding, video and text."""

from stages.stage import LanguageStage


class Multitask(LanguageStage):
    name = "multitask"
