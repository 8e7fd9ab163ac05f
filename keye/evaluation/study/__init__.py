"""The study of `keye ablate --benchmark`: settings of the encoder at equal tokens, by what they keep and by answers."""

from keye.evaluation.study.answerers import Answerer, models_of
from keye.evaluation.study.run import run_study
from keye.evaluation.study.settings import CONTENDERS, FACTORS, MEANINGS, Setting, settings_of, split_specs
from keye.evaluation.study.write import write_tables

__all__ = [
    "CONTENDERS", "FACTORS", "MEANINGS", "Answerer", "Setting", "models_of", "run_study", "settings_of", "split_specs",
    "write_tables",
]  # fmt: skip
