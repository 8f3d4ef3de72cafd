"""What a Checkpointer tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """What a Checkpointer did since it was made."""

    tier: str  # "memory", "files" or "off"
    captured: int
    skipped: int  # steps not captured, since the one before was still on its way
    replaced: int  # captured steps that were never committed and gave way to newer ones
    waited_seconds: float  # in step(), for commits
    copy_seconds: float  # from a slot's tearing to its publication
    block_seconds: float  # in step(), and in optimizer.step() for what was not yet copied, all together
    committed_step: int  # newest that the agent reported as held by enough nodes; -1: none
    last_skip: str  # why the newest skip was one
    mode: str = "blocking"  # or "overlapped": how the next capture will be done
    every: int = 1  # steps from one capture to the next
    why: str = ""  # every="auto": what the interval was chosen from
    spoiled: int = 0  # overlapped captures given up, since parameters were changed outside of optimizer.step()
    layouts: int = 0  # times that the state was laid out anew, the first time included
    bytes: int = 0  # of this rank's newest capture, tensors and table
    shares: bool = False  # captures are this rank's share of a state that is the same on every rank
    staging: str = "host"  # "registered", "pinned": how the state's device tensors travel, where it has any
    failed: int = 0  # captures given up, since a device did not copy
