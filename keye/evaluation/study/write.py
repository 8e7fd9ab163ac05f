"""Write tables, figures and the page of a study from its saved predictions; no encoder and no model runs."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

from keye.errors import writing
from keye.evaluation.study.bootstrap import DRAWS
from keye.evaluation.study.figures import heat_map, pareto
from keye.evaluation.study.page import page
from keye.evaluation.study.store import STUDY, TABLE, read_predictions, write_table
from keye.evaluation.study.tables import Answers, save_csv
from keye.files import write_atomically

PAGE = "ablation.md"


def write_tables(folder: str | Path, out: str | Path | None = None, text: str | Path | None = None) -> list[Path]:
    """Write `rows` and `pairs` as CSV and Parquet, the figures, the page and the predictions as Parquet.

    Args:
        folder: of a study, with `study.json` and its predictions as JSON Lines or as Parquet.
        out: folder to write to (default: the same).
        text: file of the page (default: `ablation.md` in `out`).

    Returns:
        The files that were written.

    Raises:
        KeyeError: the predictions do not match the study or the benchmark, or a file cannot be written.
    """
    folder = Path(folder)
    out = folder if out is None else Path(out)
    study, lines = read_predictions(folder)
    answers = Answers(lines)
    rows, pairs = answers.rows(), answers.pairs()
    with writing(out, "the tables"):
        out.mkdir(parents=True, exist_ok=True)
        written = [out / TABLE, out / STUDY]
        write_table(written[0], lines)
        if out.resolve() != folder.resolve():
            shutil.copyfile(folder / STUDY, written[1])
        for name, table in (("rows", rows), ("pairs", pairs)):
            save_csv(out / f"{name}.csv", table)
            write_table(out / f"{name}.parquet", [asdict(row) for row in table])
            written += [out / f"{name}.csv", out / f"{name}.parquet"]
        for by in answers.by:
            pareto(out / f"pareto_{by}.png", rows, by)
            heat_map(out / f"families_{by}.png", rows, by)
            written += [out / f"pareto_{by}.png", out / f"families_{by}.png"]
        place = out / PAGE if text is None else Path(text)
        where = "" if place.parent.resolve() == out.resolve() else f"{out.name}/"
        content = re.sub(r"\]\((pareto|families)_", rf"]({where}\1_", page(answers, rows, pairs, study, DRAWS))
        write_atomically(place, content)
    return [*written, place]
