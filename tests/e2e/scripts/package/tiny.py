"""The probe as a module, for `-m package.tiny`: imports nothing heavy."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    probe = str(Path(__file__).resolve().parents[1] / "probe.py")
    assert sys.argv[1:], "a module gets its arguments"
    runpy.run_path(probe, run_name="__main__")
