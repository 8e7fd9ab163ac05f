"""Stage 2, multi-task: everything learns, on captions, questions, grounding, video and text."""

from stages.stage import LanguageStage


class Multitask(LanguageStage):
    name = "multitask"
