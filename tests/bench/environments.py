"""Where the rivals live: a virtual environment each, in a cache folder outside the tree, installed once by pip.

$EVERSTEP_RIVALS, or $XDG_CACHE_HOME/everstep/rivals (~/.cache by default). PyTorch and what came with it are not installed
again: this checkout's .venv is visible behind each environment's own packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What pip is told. Pinned to what the systems' adapters (scripts/systems) were written for.
REQUIREMENTS = {
    "torchsnapshot": ["torchsnapshot==0.1.0"],
    "lm_resiliency": ["lm-resiliency==0.2.0"],
    "dlrover": ["dlrover[k8s,torch]==0.6.1", "protobuf"],  # its master imports protobuf and does not ask for it
    "nvrx": ["nvidia-resiliency-ext==0.4.1"],
}


class Unavailable(Exception):
    """A rival that cannot be installed here, and what pip said."""


def home() -> Path:
    given = os.environ.get("EVERSTEP_RIVALS")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "everstep/rivals"


def torch_packages() -> Path:
    """The folder that holds this interpreter's torch."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed beside this interpreter: run deploy/setup.sh")
    return Path(spec.origin).parents[1]


def python(system: str) -> Path:
    """The interpreter that has `system`; installs it the first time. "dcp:thread" and "torch_save" need none of their own."""
    requirements = REQUIREMENTS.get(system.partition(":")[0])
    if requirements is None:
        return Path(sys.executable)
    folder = home() / "-".join(requirements).replace("==", "-").replace("[", "-").replace("]", "").replace(",", "-")
    interpreter, done = folder / "bin/python", folder / "installed"
    if done.exists():
        return interpreter
    print(f"installing {' '.join(requirements)} into {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=300)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages/behind.pth").write_text(f"{torch_packages()}\n")
    got = subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    if got.returncode:
        raise Unavailable("pip: " + " ".join(got.stdout.split())[-500:])
    done.write_text("\n".join(requirements) + "\n")
    return interpreter
