"""A GPU that is imitated on a CPU: which tensors are on it is noted, and mixing is an error.

Values are real, so whole programs run. What is not imitated: kernels, their speed and their
rounding, streams, memory, autocast, NCCL.
"""

import contextlib

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.images import mean_and_std

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
ACROSS = ("copy_", "set_")  # may see tensors on two devices


class Memory:
    """Which storages are on the GPU."""

    def __init__(self):
        self.storages = {}  # address -> a weak reference, which keeps the address from being reused
        self.making = False  # what is made now is on the GPU
        self.moving = False  # what is made now is not, whatever it is made of

    def add(self, tensor: torch.Tensor) -> None:
        """Put a tensor on the GPU."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self.storages[reference.cdata] = reference

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return StorageWeakRef(tensor.untyped_storage()).cdata in self.storages

    @contextlib.contextmanager
    def set(self, **flags):
        """Within it `making` or `moving` is set."""
        before = dict(vars(self))
        vars(self).update(flags)
        try:
            yield
        finally:
            vars(self).update(before)


class Kernels(TorchDispatchMode):
    """Every operation, in forward and backward: all its tensors must be on one device."""

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, memory = kwargs or {}, self.memory
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [memory.holds(tensor) for tensor in tensors]
        name = func.__name__.partition(".")[0]
        if any(on_gpu) and name not in ACROSS and not memory.moving:
            on_cpu = [tuple(x.shape) for x, there in zip(tensors, on_gpu) if not there and x.ndim]
            if on_cpu:
                raise RuntimeError(f"{name}: tensors of shape {on_cpu} are on the CPU, others on "
                                   "the GPU")
        result = func(*args, **kwargs)
        if memory.making or (any(on_gpu) and not memory.moving and name not in ACROSS):
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    memory.add(tensor)
        return result


class Move(torch.autograd.Function):
    """A copy on the other device; its gradient goes the other way."""

    @staticmethod
    def forward(ctx, tensor, memory, to_gpu):
        ctx.memory, ctx.to_gpu = memory, to_gpu
        with memory.set(making=to_gpu, moving=True):
            return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        with ctx.memory.set(making=not ctx.to_gpu, moving=True):
            return gradient.clone(), None, None


class Calls(TorchFunctionMode):
    """What Python calls: `device` arguments, moves between the devices, the question where."""

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, memory = dict(kwargs or {}), self.memory
        if func == torch.Tensor.device.__get__:
            return GPU if memory.holds(args[0]) else CPU
        if func == torch.Tensor.is_cuda.__get__:
            return memory.holds(args[0])
        if func is torch.Tensor.numpy and memory.holds(args[0]):
            raise TypeError("can't convert a tensor on the GPU to numpy: call cpu() first")
        if func in MOVES:
            return self.move(func, args, kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs["device"])
        if kwargs.get("generator") is not None and kwargs["generator"].on != device.type:
            raise RuntimeError(f"expected a generator of {device}, got one of "
                               f"{kwargs['generator'].on}")
        kwargs["device"] = CPU
        with memory.set(making=device.type == "cuda"):
            return func(*args, **kwargs)

    def move(self, func, args, kwargs):
        """Tensor.to, cpu and cuda."""
        tensor, *rest = args
        target = GPU if func is torch.Tensor.cuda else CPU if func is torch.Tensor.cpu else None
        others = []  # dtype and the like
        for value in (*rest, *kwargs.values()):
            if isinstance(value, (torch.device, str)):
                target = torch.device(value)
            elif isinstance(value, torch.dtype):
                others.append(value)
        if func is torch.Tensor.to and others:
            tensor = tensor.to(others[0])
        if target is None or (target.type == "cuda") == self.memory.holds(tensor):
            return tensor
        return Move.apply(tensor, self.memory, target.type == "cuda")


class Generator(torch.Generator):
    """A generator that says which device it is of."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.on = torch.device(device).type
        return generator


@contextlib.contextmanager
def imitated_gpu(monkeypatch):
    """Within it cuda:0 exists."""
    memory = Memory()
    monkeypatch.setattr(torch, "Generator", Generator)
    mean_and_std.cache_clear()  # what is cached for cuda:0 lies in another memory
    with Kernels(memory), Calls(memory):
        yield
    mean_and_std.cache_clear()
