"""bfloat16 or float32, and kernels that CPUs need."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from med import LMHead


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast.

    auto says yes where the hardware multiplies it fast, which among CPUs means AMX (without, it
    measured four times slower than float32).
    NOTE(differs from salesforce/BLIP): there, all is float32; --precision fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


class Float32Attention(TorchFunctionMode):
    """Within it attention runs in float32, whatever the precision around it.

    For bfloat16 on a CPU: there, the kernel's bfloat16 backward is several times slower than its
    float32 one (it took half of a training step).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        q, k, v, *rest = args
        with torch.autocast("cpu", enabled=False):
            return func(q.float(), k.float(), v.float(), *rest, **kwargs).bfloat16()


@contextlib.contextmanager
def autocast(device: torch.device, bf16: bool):
    """bfloat16 where it is asked for, else as it is."""
    on_cpu = bf16 and device.type == "cpu"
    with (torch.autocast(device.type, torch.bfloat16, enabled=bf16),
          Float32Attention() if on_cpu else contextlib.nullcontext()):
        yield


# ---- a few rows on a CPU -------------------------------------------------------------------------

ROWS = 32  # fewer than this go through oneDNN


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but a few rows on a CPU go through oneDNN.

    A step of generation reads all weights for a handful of tokens. MKL, which F.linear calls, reads
    them at 10 GB/s where oneDNN does at 25 (4 to 24 rows, 2 cores): captioning at base size costs
    1.4 instead of 1.65 times the ViT with it.
    """
    if (not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
            and x.numel() <= ROWS * x.shape[-1] and torch.backends.mkldnn.is_available()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class CPULinear(nn.Linear):
    """nn.Linear by way of `linear_of_few_rows`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return linear_of_few_rows(x, self.weight, self.bias)


class CPULMHead(LMHead):
    """The decoder's head by way of `linear_of_few_rows`."""

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        """x (..., D), word embeddings (V, D) -> logits (..., V)."""
        return linear_of_few_rows(self.norm(F.gelu(self.dense(x))), word, self.bias)


def speed_up_generation(model: nn.Module) -> nn.Module:
    """The same model, on a CPU with kernels for a few rows; its weights and names stay."""
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CPULinear
            elif type(module) is LMHead:
                module.__class__ = CPULMHead
    return model
