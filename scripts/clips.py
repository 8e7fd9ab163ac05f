"""Fetch the real sample clips into .cache/clips (2.3 MB, once) and print their paths."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.clips import ClipsMissing, fetch_clips  # noqa: E402


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        print(*fetch_clips(), sep="\n")
    except ClipsMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
