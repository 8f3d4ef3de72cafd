"""Binds this process to the CPUs near its GPU as torchrun's --numa-binding does, then becomes the worker.

    python everstep_numa.py MODE LOCAL_RANK CACHE_FOLDER PROGRAM ARGS...

PyTorch itself says which CPUs (torch.numa.binding). That takes seconds, so it is asked once for each GPU of a node and
the answer kept in CACHE_FOLDER.
"""

import os
import sys


def cpus_near(mode, gpu):
    try:
        from torch.numa import binding
    except ImportError as problem:
        raise RuntimeError(f"this PyTorch cannot say which CPUs are near a GPU ({problem}); it needs 2.9 or newer") from None
    options = binding.NumaOptions(affinity_mode=binding.AffinityMode(mode))
    return set(binding._get_logical_cpus_to_bind_to(gpu_index=gpu, numa_options=options))


def main():
    mode, rank, folder, *command = sys.argv[1:]
    visible = "".join(c if c.isalnum() or c in ",-" else "_" for c in os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    cache = os.path.join(folder, f"numa-{mode}-{rank}-{visible}")
    try:
        with open(cache) as file:
            cpus = {int(cpu) for cpu in file.read().split()}
    except (OSError, ValueError):
        cpus = set()
    try:
        if not cpus:
            cpus = cpus_near(mode, int(rank))
            fresh = f"{cache}.{os.getpid()}"
            with open(fresh, "w") as file:
                file.write(" ".join(map(str, sorted(cpus))))
            os.replace(fresh, cache)
        os.sched_setaffinity(0, cpus)
    except Exception as problem:  # noqa: BLE001  whatever PyTorch finds wrong with this machine
        sys.exit(f"everstep: --numa-binding={mode} cannot be applied to local rank {rank}: {problem}; leave the flag out")
    os.execvp(command[0], command)


main()
