"""torch.compile finds one graph for each kind of layer. No kernel is compiled here."""

import pytest
import torch
from conftest import toy_batch, toy_model

from training.devices import compile_forward
from training.precision import CPULinear


def test_a_cpu_compiles_the_vit_and_a_gpu_the_text_layers_too(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **options: compiled.append((type(self).__name__, options)))
    model = toy_model()
    compile_forward(model, torch.device("cpu"))
    assert compiled == [("Block", {})] * 4  # two in the ViT, two in its twin
    compiled.clear()
    compile_forward(model, torch.device("cuda"))
    assert compiled.count(("Block", {})) == 4
    for kind in ("SelfAttentionLayer", "CrossAttentionLayer", "FeedForward"):
        assert (kind, {"dynamic": True}) in compiled


def counting_backend(graphs: list):
    """A backend for torch.compile that notes each graph and runs it as it is."""
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    return backend


def test_a_linear_layer_of_a_few_rows_is_one_graph():
    layer, graphs = CPULinear(4, 3), []
    compiled = torch.compile(layer, backend=counting_backend(graphs), fullgraph=True)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x)) and len(graphs) == 1


@pytest.mark.slow
def test_a_layer_is_compiled_once_for_all_of_its_kind_and_all_lengths(monkeypatch):
    """No graph breaks, whatever the depth; and the losses are those of the plain model."""
    plain_compile, graphs = torch.nn.Module.compile, []
    backend = counting_backend(graphs)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain_compile(
        self, **options, fullgraph=True, backend=backend))
    counts = []
    for depth in (2, 4):
        torch.compiler.reset()
        graphs.clear()
        model = toy_model(text_depth=depth, vit_depth=depth, drop_path=0.1).train()
        compile_forward(model, torch.device("cuda"))
        for alpha, length in ((0.0, 7), (0.1, 7), (0.2, 9), (0.4, 6)):
            losses, _ = model(**toy_batch(4, length), alpha=alpha)
            sum(losses.values()).backward()
        counts.append(len(graphs))
    assert counts[0] == counts[1] <= 16
    torch.compiler.reset()
    plain, compiled = toy_model().train(), toy_model().train()
    compile_forward(compiled, torch.device("cuda"))
    torch.manual_seed(0)
    expected, _ = plain(**toy_batch(4, 8), alpha=0.4)
    torch.manual_seed(0)
    losses, _ = compiled(**toy_batch(4, 8), alpha=0.4)
    for name in expected:
        assert torch.allclose(losses[name], expected[name], atol=1e-6)
