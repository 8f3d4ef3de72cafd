"""What a training script imports, read from its source: what a fork server imports ahead, and what forbids it to."""

import ast
import os
import sys

# Never imported ahead: they look at the rank, or start threads, when they are imported.
NOT_AHEAD = ("deepspeed", "horovod", "jax", "mpi4py", "tensorflow", "__future__", "__main__", "everstep")
LOADERS = ("import_module", "__import__", "exec", "eval", "run_path", "run_module")
# Read once, at import: a script that sets them before its own imports needs a fresh process.
READ_AT_IMPORT = ("OMP_", "MKL_", "OPENBLAS_", "GOTO_", "KMP_", "GOMP_", "NUMEXPR_", "BLIS_", "TORCH", "PYTORCH_NVML", "LD_")


class Refused(Exception):
    """Why workers of this job must start as fresh processes."""

    after_imports = False


class ImportedTooMuch(Refused):
    """It may be the script's own imports: without them another try is worth it."""

    after_imports = True


def local_names(folders):
    """Top-level names that a script finds in its own folders before anything installed."""
    names = {}
    for folder in folders:
        try:
            entries = sorted(os.listdir(folder or "."))
        except OSError:
            continue
        for entry in entries:
            path = os.path.join(folder, entry)
            stem = entry.split(".")[0]
            if entry.endswith((".py", ".so")):
                names.setdefault(stem, path)
            elif os.path.exists(os.path.join(path, "__init__.py")):
                names.setdefault(entry, os.path.join(path, "__init__.py"))
    return names


def reads_before_import(tree):
    """The first variable that the source sets and a library reads at import, or None."""
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            base, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            base, key = (node.func.value, node.args[0]) if node.func.attr in ("setdefault", "putenv") else (None, None)
        if key is None or not isinstance(key, ast.Constant) or not isinstance(key.value, str):
            continue
        name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        if name in ("environ", "os") and key.value.startswith(READ_AT_IMPORT) and not key.value.startswith("TORCH_NCCL"):
            return key.value
    return None


def full_names(node):
    """Modules that an import statement names; none for any other node."""
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module and not node.level else []
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def names_of(node):
    """Their top-level names."""
    return {name.split(".")[0] for name in full_names(node)}


def installed_imports(tree, local):
    """Whether the source imports anything, at any place, that is neither its own nor the standard library's."""
    names, at_top = set(), set(map(id, tree.body))
    for node in ast.walk(tree):
        if id(node) not in at_top and names_of(node) & set(local):
            return True  # what a local module needs later is not looked at
        names |= names_of(node)
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in LOADERS:
            return True
    return bool(names - set(local) - set(getattr(sys, "stdlib_module_names", ())))


def scan(path, local, imports, seen):
    """Collects what the source at `path`, and the local modules it imports, import at their top level.

    True if any of them needs what is installed: else there is nothing to gain from importing it ahead.
    """
    if path in seen:
        return False
    if len(seen) > 200 or not path.endswith(".py"):
        return True
    seen.add(path)
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return True  # the script itself will say it
    if variable := reads_before_import(tree):
        raise Refused(f"{path} sets {variable}, which libraries read when they are imported")
    worth = installed_imports(tree, local)
    bodies = list(tree.body)
    for node in bodies:
        if isinstance(node, ast.Try):
            bodies.extend(node.body)
        for name in full_names(node):
            top = name.split(".")[0]
            if top in local:
                worth = scan(local[top], local, imports, seen) or worth
            elif name not in imports and top not in NOT_AHEAD:
                imports.append(name)
    for node in ast.walk(tree):  # further in, only what is a part of torch: others may be optional
        for name in full_names(node):
            if name.startswith("torch.") and name not in imports:
                imports.append(name)
    return worth


def source_of(kind, target):
    """The script's file and the folders that the interpreter puts in front of sys.path."""
    if kind == "2":  # -m
        base = target.replace(".", "/")
        for path in (base + ".py", base + "/__main__.py"):
            if os.path.exists(path):
                return path, [os.getcwd()]
        return "", [os.getcwd()]
    path = os.path.abspath(target)
    return path, [os.path.dirname(path)] if kind == "1" else [os.getcwd()]


def extension_modules(pid):
    """Names of the extension modules that a process has mapped and this one has not: what a worker came to import."""

    def mapped(who):
        with open(f"/proc/{who}/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/") and ".so" in line}
        return {p for p in paths if p.split(".")[-1] == "so"}

    from importlib.machinery import EXTENSION_SUFFIXES

    names = []
    folders = sorted((os.path.abspath(p) + "/" for p in sys.path if p), key=len, reverse=True)
    for path in sorted(mapped(pid) - mapped("self")):
        suffix = next((s for s in EXTENSION_SUFFIXES if path.endswith(s) and s != ".so"), None)
        folder = next((f for f in folders if path.startswith(f)), None)
        if suffix is None or folder is None:
            continue
        name = path[len(folder) : -len(suffix)].replace("/", ".")
        if name.split(".")[0] not in NOT_AHEAD and all(part.isidentifier() for part in name.split(".")):
            names.append(name)
    return names
