"""The processes of one run and what they say to each other, over torch.distributed. Knows tensors, not what they mean.

Without a process group, as in most runs, there is one rank and nothing is sent.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor, distributed

from snp_llm.runtime.errors import SnpError

# A rank that waits longer for another gives up. The longest that one waits for is rank 0, reloading the saved model.
TIMEOUT = timedelta(minutes=60)

LET_GO = 0.1  # seconds

PIECE = 2**24  # numbers that go from the CPU over the GPU at a time, where only what is there can be summed

LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out")  # in torch's messages

T = TypeVar("T")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the other processes that `accelerate launch` or `torchrun` has started, if any, and leaves them at the end.

    Args:
        device: the recipe's; "cpu" keeps ranks off accelerators that are there.

    Raises:
        SnpError: another rank is gone, or has not been heard of for longer than the timeout.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    PartialState(cpu=device == "cpu", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or any(word in str(error) for word in LOST):
            raise SnpError(
                f"rank {rank()} of {rank_count()}: lost another rank ({str(error).splitlines()[0][:200]}). Look for "
                "its own message; then go on with --resume, with as many ranks as you like."
            ) from error
        raise
    # torch 2.6 waits here for the group's threads with Python's lock held, which one of them may still want, to let go
    # of the last tensor that was exchanged.
    time.sleep(LET_GO)
    distributed.destroy_process_group()  # after an error that could wait for ranks that are gone


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def rank_count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(count: int) -> range:
    """Which of `count` things in a row are this rank's; ranks differ by at most one."""
    return range(count * rank() // rank_count(), count * (rank() + 1) // rank_count())


def owner(index: int) -> int:
    """The rank that a block's algebra is done on."""
    return index % rank_count()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces contiguous tensors by their sums over ranks, in place, one after the other: none is held twice."""
    if rank_count() == 1:
        return
    over_gpu = distributed.get_backend() == "nccl"  # which sums what is on the GPU, and nothing else
    for tensor in tensors:
        if tensor.device.type != "cpu" or not over_gpu:
            distributed.all_reduce(tensor)
            continue
        for piece in tensor.view(-1).split(PIECE):
            there = piece.cuda()
            distributed.all_reduce(there)
            piece.copy_(there)


def from_rank(owner: int, make: Callable[[], T]) -> T:
    """What `make` returns on one rank, on all of them; tensors come to the others on the CPU.

    Raises:
        SnpError: `make` raised it; every rank does then.
    """
    if rank_count() == 1:
        return make()
    box: list[Any] = [None]
    if rank() == owner:
        try:
            box[0] = (send_to_device(make(), "cpu"), None)
        except SnpError as error:
            box[0] = (None, str(error))
    distributed.broadcast_object_list(box, src=owner)
    result, failure = box[0]
    if failure is not None:
        raise SnpError(failure)
    return result


def from_all(mine: T) -> list[T]:
    """What every rank brings, in the order of ranks."""
    if rank_count() == 1:
        return [mine]
    box: list[Any] = [None] * rank_count()
    distributed.all_gather_object(box, mine)
    return box


def wait() -> None:
    """Waits until all ranks have got here."""
    if rank_count() > 1:
        distributed.barrier()
