"""What the fork server reads from a training script before it imports anything."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "worker" / "keeper" / "python"))
import script_imports


def look(folder, source, **others):
    """(worth importing ahead, what would be), for a train.py beside `others`."""
    (folder / "train.py").write_text(source)
    for name, text in others.items():
        (folder / f"{name}.py").write_text(text)
    hints: list[str] = []
    local = script_imports.local_names([str(folder)])
    return script_imports.scan(str(folder / "train.py"), local, hints, set()), hints


def test_imports_at_the_top_are_hints_and_those_of_local_modules_too(tmp_path):
    worth, hints = look(
        tmp_path,
        "import torch.nn as nn, math\nfrom model import Net\ntry:\n    import wandb\nexcept ImportError:\n    pass\n"
        "def f():\n    import late\n",
        model="from transformers.models import Bert\nfrom . import sibling\n",
    )
    assert worth
    assert hints == ["torch.nn", "math", "transformers.models", "wandb"]


@pytest.mark.parametrize(
    ("source", "worth"),
    [
        ("print('nothing')\n", False),
        ("import os, sys, json\n", False),
        ("def main():\n    import torch\n", True),
        ("import importlib\nimportlib.import_module('torch')\n", True),
        ("import model\n", False),
        ("def main():\n    import model\n", True),
        ("this is no python\n", True),
    ],
)
def test_what_is_worth_importing_ahead(tmp_path, source, worth):
    assert look(tmp_path, source, model="import math\n")[0] == worth


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("import os\nos.environ['OMP_NUM_THREADS'] = '4'\nimport torch\n", "OMP_NUM_THREADS"),
        ("import os\nos.environ.setdefault('MKL_NUM_THREADS', '1')\nimport torch\n", "MKL_NUM_THREADS"),
        ("from os import environ\nenviron['TORCH_LOGS'] = 'all'\nimport torch\n", "TORCH_LOGS"),
        ("import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '0'\nimport torch\n", None),
        ("import os\nos.environ['TORCH_NCCL_BLOCKING_WAIT'] = '1'\nimport torch\n", None),
        ("import os, torch\nprint(os.environ['OMP_NUM_THREADS'])\n", None),
    ],
)
def test_variables_that_libraries_read_when_they_are_imported(tmp_path, source, refused):
    if refused is None:
        assert look(tmp_path, source)[0]
    else:
        with pytest.raises(script_imports.Refused, match=refused):
            look(tmp_path, source)


def test_modules_that_look_at_the_rank_are_never_hints(tmp_path):
    assert look(tmp_path, "import deepspeed, torch\nimport everstep\n")[1] == ["torch"]


def test_folders_of_packages_count_as_local_and_plain_folders_do_not(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "data").mkdir()
    names = script_imports.local_names([str(tmp_path), str(tmp_path / "missing")])
    assert set(names) == {"package"}


def test_imports_in_a_circle_end(tmp_path):
    assert look(tmp_path, "import a\n", a="import b\n", b="import a, torch\n") == (True, ["torch"])


def test_parts_of_torch_are_hints_wherever_they_are_imported(tmp_path):
    source = "import torch\ndef main():\n    from torch.nn.parallel import DistributedDataParallel\n    import optional\n"
    assert look(tmp_path, source)[1] == ["torch", "torch.nn.parallel"]


def test_extension_modules_of_another_process_are_found(tmp_path):
    import subprocess

    code = "import numpy.random, _decimal, sys; print('ready', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    look = f"import sys; sys.path.insert(0, {str(pathlib.Path(script_imports.__file__).parent)!r}); import script_imports; "
    look += f"print(*script_imports.extension_modules({child.pid}))"
    names = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    child.communicate()
    assert "numpy.random.mtrand" in names
    assert "_decimal" in names
