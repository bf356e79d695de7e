"""Door to `ouroboros3d.cli.average_weights`; --help says what it does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ouroboros3d.cli import run

if __name__ == "__main__":
    run("average_weights")
