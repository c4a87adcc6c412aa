"""torch.compile finds one graph in the whole forward pass. No kernel is compiled here."""

import pytest
import torch
from conftest import toy_batch, toy_model

from training.devices import compile_forward
from training.precision import CPULinear


def test_a_cpu_compiles_the_vit_and_a_gpu_all_of_the_forward_pass(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **options: compiled.append((self, options)))
    model = toy_model()
    compile_forward(model, torch.device("cpu"))
    compile_forward(model, torch.device("cuda"))
    assert compiled == [(model.vit, {}), (model, {"dynamic": True})]


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
def test_the_forward_pass_is_one_graph_whatever_alpha_and_the_length_are():
    model, graphs = toy_model(dropout=0.1).train(), []
    model.compile(dynamic=True, fullgraph=True, backend=counting_backend(graphs))
    for alpha, length in ((0.0, 7), (0.1, 7), (0.2, 9), (0.4, 6)):
        losses, _ = model(**toy_batch(4, length), alpha=alpha)
        sum(losses.values()).backward()
    assert len(graphs) == 1
