"""Everything about several processes: the rest of the code is the same with and without torchrun.

Without a process group each collective returns its input.
`torchrun --nproc_per_node=8 train.py ...` makes two groups. Tensors go through the first one, NCCL
on CUDA and gloo on a CPU; NCCL gives up when a rank lets the others wait for ten minutes. So ranks
wait for one another, and exchange Python objects, in the second one: a patient gloo group.
"""

import contextlib
import inspect
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

# While rank 0 indexes a large set, or one rank has the slowest shard, the others wait.
PATIENCE = timedelta(days=1)
patient_group = None  # None: the group of tensors serves both


def init(device: torch.device) -> None:
    """Join torchrun's process group if there is one. device: this process's."""
    global patient_group
    if "RANK" in os.environ and not dist.is_initialized():
        # Under torchrun --max-restarts the new processes meet in the store of the old ones, and
        # would wait at their dead addresses: each attempt has names of its own.
        store, number, processes = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                rank=number, world_size=processes)
        patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)


def finish() -> None:
    """Leave the process group."""
    global patient_group
    patient_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args, **kwargs) -> None:
    """print, on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """x (B, ...) of this rank -> (world * B, ...), in rank order, without gradient.

    B must be equal on all ranks.
    """
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class GatherWithGrad(torch.autograd.Function):
    """all_gather whose backward hands each rank the sum of all ranks' gradients of its rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """(B, ...) -> (world * B, ...)."""
        return all_gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """(world * B, ...) -> (B, ...)."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """x (B, ...) of this rank -> (world * B, ...), with gradient.

    With DistributedDataParallel's mean over ranks it is the gradient of the mean of the ranks'
    losses.
    """
    return x if world_size() == 1 else GatherWithGrad.apply(x)


def gather_texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ids and mask (B, L), where L may differ between ranks -> (world * B, longest L)."""
    longest = torch.tensor(ids.shape[1], device=ids.device)
    if world_size() > 1:
        dist.all_reduce(longest, dist.ReduceOp.MAX)
    padding = (0, int(longest) - ids.shape[1])  # with 0; the mask hides it
    return all_gather(F.pad(ids, padding)), all_gather(F.pad(mask, padding))


def own_part(items: list) -> list:
    """This rank's part of independent work: with 4 processes, rank 1 takes items 1, 5, 9 ..."""
    return items[rank()::world_size()]


def gather(items: list) -> list:
    """Lists of anything that can be pickled -> one list, in rank order.

    A tensor that is a view of a larger one is sent with all of the larger one: give a copy.
    """
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items, patient_group)
    return [item for part in parts for item in part]


def from_rank_0(work: Callable[[], object]) -> object:
    """What `work` returns on rank 0, on all ranks. The others wait for it and do nothing."""
    result, = gather([work()] if rank() == 0 else [])
    return result


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(patient_group)


def progress(iterable=None, about: str = "", **options) -> tqdm:
    """A tqdm bar that leaves no trace, on rank 0 only."""
    return tqdm(iterable, about, leave=False, disable=rank() > 0, **options)


def no_sync(net: torch.nn.Module, skip: bool):
    """A context in which, if `skip`, gradients are added up on this rank alone.

    So the mean over ranks is taken once a step, behind its last micro-batch.
    """
    wrapped = isinstance(net, torch.nn.parallel.DistributedDataParallel)
    return net.no_sync() if skip and wrapped else contextlib.nullcontext()


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model in DistributedDataParallel, or the model itself without a group.

    Buffers are not sent around in every step: the queues are equal on all ranks because they start
    from one seed and take the same gathered keys. Parameters that the current objectives never
    reach must be frozen before (training/reach.py).
    """
    if world_size() == 1:
        return model
    kind = torch.nn.parallel.DistributedDataParallel
    newer = "forward_sync_buffers" in inspect.signature(kind.__init__).parameters  # torch 2.13
    return kind(model, gradient_as_bucket_view=True,  # no second copy of the gradients
                **{"forward_sync_buffers" if newer else "broadcast_buffers": False})
