"""House rules that a compiler does not check.

1. A pure core (controller/core, controller/planner, controller/policy, checkpoint/core, worker/agent/core) includes proto/base, other cores and
   the C++ standard library only, and uses no clock, thread, random device, file or environment.
2. The keeper includes no gRPC (it must stay small and must not die).
3. worker/ and checkpoint/ include nothing of controller/, controller/ nothing of worker/, checkpoint/
   nothing of worker/, and proto/ nothing of any: what two of them need stands in proto/.
4. Every package that deploy/setup.sh installs is named, with its reason, in docs/start.md.

Prints each breach as file:line: text and exits 1; exits 0 with a count of what it looked at.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
CORES = ("controller/core", "controller/planner", "controller/policy", "checkpoint/core", "worker/agent/core")
ALLOWED = ("proto/base/", *(c + "/" for c in CORES))
STRANGERS = {  # whose headers a side may not include
    "controller": ("worker/",),
    "worker": ("controller/",),
    "checkpoint": ("controller/", "worker/"),
    "proto": ("controller/", "worker/", "checkpoint/"),
}
IMPURE_HEADERS = {
    "thread", "mutex", "shared_mutex", "condition_variable", "future", "fstream", "iostream",
    "filesystem", "ctime", "random", "cstdio", "csignal",
}
IMPURE_CALLS = re.compile(
    r"\b(?:std::chrono::\w+_clock|std::this_thread|std::getenv|getenv|std::random_device|clock_gettime)\b"
)
INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]')


def sources(folder: str) -> list[pathlib.Path]:
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".h", ".cc") and p.is_file())


def check_core(path: pathlib.Path) -> list[tuple[int, str]]:
    breaches = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = INCLUDE.match(line)
        if found:
            quote, name = found.groups()
            if quote == '"' and not name.startswith(ALLOWED):
                breaches.append((number, f'a core may not include "{name}" (allowed: {", ".join(ALLOWED)})'))
            if name == "proto/base/kill_point.h":
                breaches.append((number, "a core decides, its shell dies: kill points belong to the shell"))
            if quote == "<" and not name.startswith("fmt/") and (
                    name in IMPURE_HEADERS or "/" in name or name.endswith(".h")):
                breaches.append((number, f"a core may not include <{name}>: time, threads and I/O belong to the shell"))
        elif IMPURE_CALLS.search(line.split("//")[0]):
            breaches.append((number, "a core may not read clocks, threads or the environment: pass it in the event"))
    return breaches


def check_keeper(path: pathlib.Path) -> list[tuple[int, str]]:
    return [
        (number, "the keeper links no gRPC")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := INCLUDE.match(line)) and found.group(2).startswith(("grpc", "grpcpp"))
    ]


def check_sides(path: pathlib.Path) -> list[tuple[int, str]]:
    side = path.relative_to(ROOT).parts[0]
    return [
        (number, f'{side}/ may not include "{found.group(2)}": what both need stands in proto/')
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := INCLUDE.match(line)) and found.group(2).startswith(STRANGERS[side])
    ]


def check_packages() -> list[str]:
    listed = re.search(r"^packages=\(\n(.*?)^\)", (ROOT / "deploy/setup.sh").read_text(), re.MULTILINE | re.DOTALL)
    if listed is None:
        return ["deploy/setup.sh: no list of packages was found"]
    rows = [line for line in (ROOT / "docs/start.md").read_text().splitlines() if line.startswith("| `")]
    named = set(re.findall(r"[\w+.-]+", " ".join(" ".join(re.findall(r"`([^`]+)`", row)) for row in rows)))
    return [f"deploy/setup.sh installs {package}, which docs/start.md does not name" for package in listed.group(1).split()
            if package not in named]


def main() -> int:
    breaches = 0
    for text in check_packages():
        print(text)
        breaches += 1
    jobs = [(p, check_core) for c in CORES for p in sources(c)]
    jobs += [(p, check_keeper) for p in sources("worker/keeper")]
    jobs += [(p, check_sides) for side in STRANGERS for p in sources(side)]
    for path, check in jobs:
        for number, text in check(path):
            print(f"{path.relative_to(ROOT)}:{number}: {text}")
            breaches += 1
    looked = len({path for path, _ in jobs})
    print(f"house rules: {looked} files, {breaches} breaches")
    if looked == 0:
        print("error: no core found below the source folder; the rules looked at nothing", file=sys.stderr)
        return 1
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
