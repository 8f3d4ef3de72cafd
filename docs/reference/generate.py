"""Writes c-abi.md from worker/client/everstep.h and python.md from the package's docstrings.

    docs/reference/generate.py            writes both
    docs/reference/generate.py --check    exit 1 when one of them is not what would be written

Reads source text only: neither the library nor torch is loaded.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "worker/client/everstep.h"
PACKAGE = ROOT / "worker/python/everstep"


def comment_text(comment: str) -> str:
    lines = [re.sub(r"^\s*\*? ?", "", line).rstrip() for line in comment.strip("/*").splitlines()]
    return "\n".join(lines).strip()


def c_abi() -> str:
    source = HEADER.read_text()
    out = ["# libeverstep.so: the C ABI", "",
           "Written by `docs/reference/generate.py` from `worker/client/everstep.h`; a test keeps it equal.", ""]
    first = re.search(r"/\*.*?\*/", source, re.S)
    assert first
    intro, _, conventions = comment_text(first.group()).partition("Conventions:")
    listed, _, after = conventions.partition("\n\n")
    out += [intro.strip(), "", "## Conventions", "", re.sub(r"\n(?!\d)", "\n   ", re.sub(r"(?m)^ +", "", listed.strip("\n"))), "", after.strip(), ""]
    body = source[source.index("#define EVERSTEP_ABI_VERSION"):]

    out += ["## Values", "", "| name | value | |", "|---|---|---|"]
    for name, value, note in re.findall(r"#define (EVERSTEP_\w+) (\S+)(?:[ \t]*/\*(.*?)\*/)?", body):
        out.append(f"| `{name}` | {value.strip('()')} | {' '.join(note.split())} |")
    out.append("")

    out += ["## Structs", ""]
    for fields, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", body, re.S):
        out += [f"### {name}", "", "```c", f"typedef struct {name} {{"]
        out += [line.rstrip() for line in fields.strip("\n").splitlines()]
        out += [f"}} {name};", "```", ""]

    out += ["## Functions", ""]
    functions = re.compile(r"(?:/\*(?P<note>(?:(?!\*/).)*)\*/\s*)?(?P<decl>(?:int|void|uint32_t|const char\*) everstep_\w+\([^;]*\));",
                           re.S)
    for match in functions.finditer(body):
        name = re.search(r"(everstep_\w+)\(", match["decl"])
        assert name
        out += [f"### {name[1]}", "", "```c", re.sub(r"\n\s+", "\n    ", match["decl"]) + ";", "```", ""]
        if match["note"]:
            out += [comment_text(match["note"]), ""]
    return "\n".join(out).rstrip() + "\n"


def signature(node: ast.FunctionDef) -> str:
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^self(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"({arguments}){returns}"


def docstring(node: ast.ClassDef | ast.FunctionDef) -> list[str]:
    text = ast.get_docstring(node) or ""
    out: list[str] = []
    in_arguments = False
    for line in text.splitlines():
        if line == "Args:":
            in_arguments = True
            out.append("Arguments:")
            out.append("")
        elif in_arguments and (match := re.match(r"    (\w+): (.*)", line)):
            out.append(f"- `{match[1]}`: {match[2]}")
        elif in_arguments and line.startswith("        "):
            out.append("  " + line.strip())
        else:
            in_arguments = in_arguments and not line
            out.append(line)
    return out


def python() -> str:
    init = ast.parse((PACKAGE / "__init__.py").read_text())
    out = ["# The everstep package", "",
           "Written by `docs/reference/generate.py` from the package's docstrings; a test keeps it equal.", "",
           inspect.cleandoc(ast.get_docstring(init) or ""), ""]
    out += described("everstep", ("checkpointer.py", "_stats.py", "_library.py", "session.py", "_samples.py"),
                     ("Checkpointer", "Stats", "Session", "Share", "EverstepError", "StaleGenerationError"),
                     called=("Checkpointer", "Session"))
    out += described("everstep.pipeline", ("pipeline/engine.py", "pipeline/_planner.py"),
                     ("Pipeline", "Report", "PlanRefusedError"), called=("Pipeline",))
    dcp = ast.parse((PACKAGE / "dcp/__init__.py").read_text())
    out += ["## everstep.dcp", "", inspect.cleandoc(ast.get_docstring(dcp) or ""), ""]
    # What DCP calls is DCP's to describe.
    out += described("everstep.dcp", ("dcp/_writer.py", "dcp/_reader.py", "dcp/_stager.py"),
                     ("StorageWriter", "StorageReader", "Found", "Stager"), called=("StorageWriter", "StorageReader"),
                     methods={"StorageWriter": (), "StorageReader": ("newest",), "Stager": ("stage", "close")})
    hf = ast.parse((PACKAGE / "hf.py").read_text())
    out += ["## everstep.hf", "", inspect.cleandoc(ast.get_docstring(hf) or ""), ""]
    out += described("everstep.hf", ("hf.py",), ("EverstepCallback",), called=("EverstepCallback",),
                     methods={"EverstepCallback": ("resume", "stats")})
    return "\n".join(out).rstrip() + "\n"


def described(package: str, modules: tuple[str, ...], names: tuple[str, ...], called: tuple[str, ...],
              methods: dict[str, tuple[str, ...]] | None = None) -> list[str]:
    """Sections for classes of `modules`; of those in `called` how they are made; of `methods`, these alone."""
    out: list[str] = []
    classes: dict[str, tuple[ast.ClassDef, list[str]]] = {}
    for module in modules:
        text = (PACKAGE / module).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node, text.splitlines()
    only = methods or {}
    for name in names:
        node, lines = classes[name]
        found = [m for m in node.body if isinstance(m, ast.FunctionDef)]
        init_method = next((m for m in found if m.name == "__init__"), None)
        shown = signature(init_method) if init_method and name in called else ""
        out += [f"## {package}.{name}", ""]
        if shown:
            out += ["```python", f"{package}.{name}{shown}", "```", ""]
        out += [*docstring(node), ""]
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
        if fields:
            out += ["| field | type | |", "|---|---|---|"]
            for field in fields:
                note = lines[field.lineno - 1].partition("#")[2].strip()
                kind = ast.unparse(field.annotation).replace("|", "\\|")
                out.append(f"| `{ast.unparse(field.target)}` | {kind} | {note} |")
            out.append("")
        for method in found:
            if method.name.startswith("_") or (name in only and method.name not in only[name]):
                continue
            is_property = any(ast.unparse(d) == "property" for d in method.decorator_list)
            out += [f"### {name}.{method.name}", "", "```python",
                    f"{method.name}{'' if is_property else signature(method)}", "```", "", *docstring(method), ""]
    return out


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    stale = []
    for name, text in (("c-abi.md", c_abi()), ("python.md", python())):
        path = ROOT / "docs/reference" / name
        if check:
            if not path.exists() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    for name in stale:
        print(f"docs/reference/{name} is not what docs/reference/generate.py would write: run it")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
