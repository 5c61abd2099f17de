"""Short messages between the ranks of a run, as bytes: torch's own object collectives unpickle what they receive.

All ranks of the group call a function at once. It waits for the slowest rank, and for a missing one until the group's
timeout (`strategy.Groups`); then, or as soon as a rank's connection breaks, it raises a RuntimeError on every rank
that waits, and Ray Train starts the group again. The group must be one of gloo, whose tensors are on the CPU.

`worker` asks rank 0 where to begin; `checkpoint` collects what each rank has written.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def gathered(message: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """The message of every rank, in the order of the ranks, on all of them.

    First the lengths travel, then the messages, each filled up with zeros to the longest.
    """
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(lengths, torch.tensor([len(message)]), group=group)
    longest = max(int(length) for length in lengths)
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
    if longest:
        dist.all_gather(parts, _tensor(message.ljust(longest, b"\0")), group=group)
    return [part.numpy().tobytes()[: int(length)] for part, length in zip(parts, lengths, strict=True)]


def from_rank_0(message: bytes, group: dist.ProcessGroup) -> bytes:
    """The message of rank 0 on all ranks; what the others give is ignored."""
    is_first = group.rank() == 0
    length = torch.tensor([len(message) if is_first else 0])
    dist.broadcast(length, group=group, group_src=0)
    content = _tensor(message if is_first else bytes(int(length)))
    if length:
        dist.broadcast(content, group=group, group_src=0)
    return content.numpy().tobytes()


def _tensor(message: bytes) -> torch.Tensor:
    """uint8 [bytes]"""
    return torch.tensor(list(message), dtype=torch.uint8)
