"""torch.distributed.checkpoint with its state in the node's memory: change one argument.

    import torch.distributed.checkpoint as dcp
    from everstep.dcp import StorageReader, StorageWriter

    dcp.save(state, checkpoint_id=f"ckpt/step-{n}", storage_writer=StorageWriter())
    dcp.async_save(state, checkpoint_id=f"ckpt/step-{n}", storage_writer=writer)

    reader = StorageReader("ckpt")
    if reader.newest() is not None:
        dcp.load(state, storage_reader=reader)

Under `everstep run` a save goes into the arena of each rank, is copied to a peer and committed, as a
Checkpointer's steps are; with `--ckpt-dir` agents write it to files from there. Anywhere else the checkpoint is a
folder at the path that was named, in the format of those files: safetensors and a manifest. Nothing is pickled
in either; what cannot be kept without is refused by its name.
"""

from everstep.dcp._reader import Found, StorageReader
from everstep.dcp._stager import Stager
from everstep.dcp._writer import StorageWriter

__all__ = ["Found", "Stager", "StorageReader", "StorageWriter"]
