"""The long part of `tests/run.sh lint`: clang-tidy over every C++ source of the project.

    tests/lint.py BUILD [FOLDER ...] [--since REF] [--jobs N]

BUILD is a configured build folder with compile_commands.json (build/lint). A source that was clean is
not looked at again until its text after the preprocessor, its flags or the rules change (BUILD/clean
holds one empty file for each such text), so the first run takes long and later ones what changed.
FOLDERs, from the project's root, leave out the sources elsewhere. `--since REF` leaves out those that
neither differ from the git commit REF nor include a header that does.
Exit code: 0 clean, 1 findings (printed), 2 the check could not run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIDY = "clang-tidy-14"
SECONDS_A_FILE = 3600  # a busy machine is not a fault of the source
NEWEST_KEPT = 2000  # stamps; older ones are of texts that are gone
INCLUDED = re.compile(rb'^# \d+ "([^"]+)"', re.MULTILINE)


@dataclasses.dataclass
class Source:
    path: Path
    flags: list[str]  # the compiler and its flags without -c, -o
    folder: Path


@dataclasses.dataclass
class Verdict:
    path: Path
    clean: bool
    looked: bool  # False: its text was clean before, or it is not among the changed ones
    text: str = ""
    seconds: float = 0.0


def sources(build: Path) -> list[Source]:
    """The project's own entries of the compilation database, each file once."""
    found: dict[Path, Source] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = (Path(entry["directory"]) / entry["file"]).resolve()
        if not path.is_relative_to(ROOT) or path.is_relative_to(build) or path in found:
            continue
        words = shlex.split(entry["command"])
        if Path(words[0]).name == "ccache":
            del words[0]
        del words[words.index("-o") : words.index("-o") + 2]
        del words[words.index("-c") : words.index("-c") + 2]
        found[path] = Source(path, words, Path(entry["directory"]))
    return sorted(found.values(), key=lambda source: source.path)


def preprocessed(source: Source) -> bytes:
    """What the compiler sees, with comments: a NOLINT is one."""
    done = subprocess.run([*source.flags, "-E", "-C", str(source.path)], cwd=source.folder,
                          capture_output=True, timeout=SECONDS_A_FILE, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.path}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def check(source: Source, build: Path, rules: bytes, changed: set[Path] | None) -> Verdict:
    """One source under clang-tidy, unless `changed` leaves it out or the same text was clean."""
    began = time.monotonic()
    text = preprocessed(source)
    if changed is not None:
        included = {os.path.normpath(source.folder / os.fsdecode(name))
                    for name in set(INCLUDED.findall(text))}
        if not any(str(path) in included for path in changed):
            return Verdict(source.path, clean=True, looked=False)
    digest = hashlib.sha256(rules + repr(source.flags).encode() + text).hexdigest()
    stamp = build / "clean" / digest
    if stamp.exists():
        stamp.touch()
        return Verdict(source.path, clean=True, looked=False)
    done = subprocess.run([TIDY, "-p", str(build), "--quiet", str(source.path)], cwd=ROOT,
                          capture_output=True, timeout=SECONDS_A_FILE, check=False)
    out = done.stdout.decode(errors="replace")
    if done.returncode == 0:
        stamp.touch()
    else:
        out += done.stderr.decode(errors="replace")
    return Verdict(source.path, done.returncode == 0, True, out, time.monotonic() - began)


def changed_since(ref: str) -> set[Path]:
    """Files of the working tree, new ones too, that differ from commit `ref`."""
    names: list[str] = []
    for command in (["git", "diff", "--name-only", ref, "--"],
                    ["git", "ls-files", "--others", "--exclude-standard"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"--since {ref}: {done.stderr.strip()}")
        names += done.stdout.splitlines()
    return {ROOT / name for name in names}


def forget_old(stamps: Path) -> None:
    """Keeps the stamps that were of use last."""
    by_age = sorted(stamps.iterdir(), key=lambda stamp: stamp.stat().st_mtime, reverse=True)
    for stamp in by_age[NEWEST_KEPT:]:
        stamp.unlink(missing_ok=True)


def main() -> int:
    """Checks all sources on --jobs threads and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--since", metavar="REF")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    arguments = parser.parse_intermixed_args()
    build = arguments.build.resolve()
    began = time.monotonic()
    try:
        version = subprocess.run([TIDY, "--version"], capture_output=True, timeout=60, check=True).stdout
        rules = version + (ROOT / ".clang-tidy").read_bytes()
        changed = changed_since(arguments.since) if arguments.since else None
        if changed and ROOT / ".clang-tidy" in changed:
            changed = None  # other rules: every source is concerned
        (build / "clean").mkdir(exist_ok=True)
        forget_old(build / "clean")
        every = sources(build)
        if arguments.folders:
            wanted = [ROOT / folder for folder in arguments.folders]
            every = [source for source in every if any(source.path.is_relative_to(f) for f in wanted)]
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bad = looked = 0
    broken = False
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        work = [pool.submit(check, source, build, rules, changed) for source in every]
        for number, done in enumerate(concurrent.futures.as_completed(work), 1):
            try:
                verdict = done.result()
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                print(f"error: {error}", file=sys.stderr)
                broken = True
                continue
            looked += verdict.looked
            bad += not verdict.clean
            if verdict.looked:
                name = verdict.path.relative_to(ROOT)
                print(f"[{number}/{len(every)}] {name} {verdict.seconds:.0f} s", flush=True)
            if not verdict.clean:
                print(verdict.text, flush=True)
    print(f"clang-tidy: {looked} of {len(every)} sources looked at, {bad} with findings, "
          f"{time.monotonic() - began:.0f} s")
    return 2 if broken else int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
