"""bfloat16, float16 or float32, and kernels that CPUs need."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from med import LMHead

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(precision: str, device: torch.device) -> str:
    """What --precision means on a device: bf16, fp16 or fp32.

    auto is bfloat16 where the hardware multiplies it fast: on GPUs since Ampere, and on CPUs with
    AMX (without, it measured four times slower than float32). GPUs before Ampere emulate bfloat16
    and multiply float16 fast.
    NOTE(differs from salesforce/BLIP): there, all is float32; --precision fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return "bf16" if device.type == "cpu" and capabilities.get("amx_bf16") else "fp32"


class Float32Attention(TorchFunctionMode):
    """Within it attention runs in float32, whatever the precision around it.

    For a CPU: there, the kernel's bfloat16 backward is several times slower than its float32 one
    (it took half of a training step).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dtype == torch.float32:
            return func(*args, **kwargs)
        dtype = args[0].dtype
        def in_float32(value):  # queries, keys, values, and a mask that is a bias, as T5's
            is_half = isinstance(value, Tensor) and value.dtype == dtype
            return value.float() if is_half else value
        args = [in_float32(value) for value in args]
        kwargs = {name: in_float32(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs).to(dtype)


@contextlib.contextmanager
def autocast(device: torch.device, precision: str):
    """Within it matrices are multiplied in this precision: bf16, fp16 or fp32."""
    if precision == "fp32":
        yield
        return
    with (torch.autocast(device.type, TYPES[precision]),
          Float32Attention() if device.type == "cpu" else contextlib.nullcontext()):
        yield


@contextlib.contextmanager
def evaluation_precision(precision: str, device: torch.device):
    """Within it a model is evaluated: on CUDA in the precision that it was trained in.

    There, what is float32 is multiplied as TF32. ITC's similarities are not touched: they are
    computed on the CPU. On other devices all is float32, and numbers can be compared to the last
    digit.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with autocast(device, choose_precision(precision, device)):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- a few rows on a CPU -------------------------------------------------------------------------

ROWS = 32  # fewer than this go through oneDNN
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked here: torch.compile cannot follow it


def linear_of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but a few rows on a CPU go through oneDNN.

    A step of generation reads all weights for a handful of tokens. MKL, which F.linear calls, reads
    them at 10 GB/s where oneDNN does at 25 (4 to 24 rows, 2 cores): captioning at base size costs
    1.4 instead of 1.65 times the ViT with it.
    """
    if (not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
            and x.numel() <= ROWS * x.shape[-1] and HAS_ONEDNN):
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
            elif getattr(module, "linear", None) is F.linear:
                module.linear = linear_of_few_rows
    return model
