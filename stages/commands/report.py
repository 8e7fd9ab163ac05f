"""Write a run's report.html from its files, also while the run goes on. Training writes it after each stage and phase.

examples:
keye report runs/mine
"""

import argparse
from pathlib import Path

from keye.errors import CheckpointError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run's directory, such as runs/tiny")
    args = parser.parse_args()
    if not Path(args.run).is_dir():
        raise CheckpointError(f"{args.run}: no such run; name the directory of --out")
    made = ("recipe.toml", "*/metrics.jsonl", "plans", "evaluation", "gspo", "ablation")
    if not any(found for name in made for found in Path(args.run).glob(name)):
        raise CheckpointError(
            f"{args.run} is not a run: it has neither recipe.toml nor a stage's metrics.jsonl; name the directory that "
            "pre-training writes to"
        )
    from stages.report import page as report

    print(f"wrote {report.write(args.run)}")


if __name__ == "__main__":
    run(main)
