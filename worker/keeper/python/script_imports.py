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


def names_of(node):
    """Top-level names that an import statement names."""
    if hasattr(node, "module"):  # from X import ...
        return {node.module.split(".")[0]} if node.module and not node.level else set()
    return {alias.name.split(".")[0] for alias in node.names}


def installed_imports(tree, local):
    """Whether the source imports anything, at any place, that is neither its own nor the standard library's."""
    names, at_top = set(), set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in at_top and names_of(node) & set(local):
            return True  # what a local module needs later is not looked at
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= names_of(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in LOADERS:
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
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Try):
            bodies.extend(node.body)
        for name in names:
            top = name.split(".")[0]
            if top in local:
                worth = scan(local[top], local, imports, seen) or worth
            elif name not in imports and top not in NOT_AHEAD:
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
