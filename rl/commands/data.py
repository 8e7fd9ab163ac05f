"""`keye data`: check training data (`stages.commands.data`), or mark questions that need no video (`mark-blind`)."""

import sys


def main() -> int:
    """Run the check, or with `mark-blind` as the first word the mark of questions."""
    if sys.argv[1:2] == ["mark-blind"]:
        from rl.commands import mark_blind

        sys.argv = [f"{sys.argv[0]} mark-blind", *sys.argv[2:]]
        return mark_blind.main()
    from stages.commands import data

    return data.main()
