"""A compacted file answers the same, keeps its public names, and says nothing of where it was made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgesolve.host import export
from edgesolve.host.compact import compact

FLOAT = onnx.TensorProto.FLOAT
ONE = np.ones(1, np.float32)


def value(name):
    return helper.make_tensor_value_info(name, FLOAT, [1])


def model_of(nodes, outputs, constants):
    tensors = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "made in /home", [value("a")], map(value, outputs), tensors)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def answers(model: bytes, a=2.0):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_outputs()]
    return dict(zip(names, session.run(None, {"a": np.full(1, a, np.float32)}), strict=True))


def stored(model: bytes):
    return onnx.load_from_string(model).graph.initializer


def test_public_names_stay_and_equal_constants_are_stored_once():
    nodes = [
        helper.make_node("Add", ["a", "one"], ["b"]),
        helper.make_node("Add", ["b", "other_one"], ["long"]),
        helper.make_node("Mul", ["long", "b"], ["c"]),
    ]
    small = compact(model_of(nodes, ["c"], {"one": ONE, "other_one": ONE}))
    assert len(stored(small)) == 1
    assert answers(small) == {"c": 12.0}


def test_a_constant_that_is_an_output_keeps_its_name():
    nodes = [helper.make_node("Add", ["a", "one"], ["b"])]
    small = compact(model_of(nodes, ["b", "other_one"], {"one": ONE, "other_one": ONE}))
    assert answers(small) == {"b": 3.0, "other_one": 1.0}


def test_a_graph_inside_a_node_still_reads_what_is_around_it():
    inner = helper.make_graph(
        [helper.make_node("Add", ["a", "one"], ["sum"])], "then", [], [value("sum")]
    )
    nodes = [
        helper.make_node("Greater", ["a", "one"], ["large"]),
        helper.make_node("Squeeze", ["large"], ["is_large"]),
        helper.make_node("If", ["is_large"], ["c"], then_branch=inner, else_branch=inner),
    ]
    assert answers(compact(model_of(nodes, ["c"], {"one": ONE}))) == {"c": 3.0}


def test_an_exported_file_tells_nothing_of_the_machine_that_made_it():
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    example = torch.rand(2, 3, 8, 8)
    model = export.to_onnx(module, (example,), ("frames",), free_batch=True)
    for told in (str(Path(__file__).resolve().parents[2]), "stack_trace", "Sequential", "File "):
        assert told.encode() not in model
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"frames": example.numpy()})
    np.testing.assert_allclose(found, module(example).detach().numpy(), rtol=1e-4, atol=1e-5)
