"""Which precision is chosen; float16 with its scaler, in training and over a resumption."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_states, run

from attention import attend
from training import checkpoints
from training import precision as precision_of
from training.precision import autocast, choose_precision, evaluation_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize("capability, expected",
                         [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_gets_the_half_precision_that_it_multiplies_fast(monkeypatch, capability, expected):
    """A T4 says that it supports bfloat16, and emulates it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("fp32", CUDA) == "fp32"


def test_a_matrix_product_has_the_precision_that_is_asked_for():
    x = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16),
                             ("fp16", torch.float16)):
        with autocast(CPU, precision):
            assert (x @ x).dtype == dtype


def test_attention_takes_a_bias_in_half_precision():
    """As T5's: on a CPU attention leaves bfloat16, and its bias must come along."""
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.bfloat16) for _ in range(3))
    bias = torch.randn(1, 2, 3, 3, dtype=torch.bfloat16)
    expected = attend(q.float(), k.float(), v.float(), bias.float())
    with autocast(CPU, "bf16"):
        for output in (attend(q, k, v, bias),
                       F.scaled_dot_product_attention(q, k, v, attn_mask=bias)):
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


def test_an_evaluation_on_a_cpu_is_in_float32():
    with evaluation_precision("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "highest"


def test_an_evaluation_on_cuda_is_as_the_training_was_and_leaves_nothing_behind(monkeypatch):
    entered = []
    def autocast_of_cuda(device, precision):
        entered.append((device, precision))
        return contextlib.nullcontext()
    monkeypatch.setattr(precision_of, "autocast", autocast_of_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with evaluation_precision("auto", CUDA):
        assert entered == [(CUDA, "bf16")]
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_float16_is_resumed_with_its_scaler(tmp_path):
    flags = ["--scenes", 48, "--epochs", 1, "--precision", "fp16", "--dropout", 0.1,
             "--grad-clip", 1, "--keep", 9, "--save-every", 3]
    assert run(tmp_path / "whole", *flags) == 0
    first = checkpoints.load(tmp_path / "whole" / "checkpoint-00000003.pt")
    last = checkpoints.load(tmp_path / "whole" / "checkpoint.pt")
    assert first["scaler"]["scale"] > 1
    assert first["scaler"]["_growth_tracker"] < last["scaler"]["_growth_tracker"]
    weight = "med.embeddings.word.weight"
    assert last["model"][weight].isfinite().all()
    assert not torch.equal(first["model"][weight], last["model"][weight])
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-00000003.pt").rename(tmp_path / "part" / "checkpoint.pt")
    assert run(tmp_path / "part", "--precision", "fp16", "--resume") == 0
    assert equal_states(tmp_path / "whole", tmp_path / "part")
    assert checkpoints.load(tmp_path / "part" / "checkpoint.pt")["scaler"] == last["scaler"]
