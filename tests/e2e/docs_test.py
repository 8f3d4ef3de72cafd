"""docs/concepts/templates.md: what its worked example shows is what `everstep plan` prints."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from launch import PROGRAMS, ROOT, clean_environment

PAGE = ROOT / "docs/concepts/templates.md"


def blocks(text: str) -> list[str]:
    """What stands between lines of three backticks."""
    return [block for i, block in enumerate(re.split(r"^```.*\n", text, flags=re.MULTILINE)) if i % 2]


def test_every_command_of_the_worked_example_prints_what_the_page_shows(tmp_path: Path) -> None:
    found = blocks(PAGE.read_text())
    (profile,) = [block for block in found if block.startswith("everstep-profile")]
    (tmp_path / "toy.csv").write_text(profile)
    shown = [block.split("\n", 1) for block in found if block.startswith("$ everstep plan")]
    assert len(shown) >= 5
    for command, expected in shown:
        words = shlex.split(command)[2:]
        done = subprocess.run([str(PROGRAMS / "everstep"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                              env=clean_environment(), stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout + done.stderr == expected, command
