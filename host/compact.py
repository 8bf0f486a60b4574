"""An ONNX file without what its exporter left in it."""

from __future__ import annotations

from itertools import count

import onnx


def compact(model: onnx.ModelProto) -> bytes:
    """The same graph with short names and each constant once, and nothing of how or where it was made.

    Exporters keep stack traces with the paths of the machine that built it; names are a tenth of a small int8 file.
    Inputs and outputs keep their names. A graph inside a node (If, Loop) may read names around it: all stay then.
    """
    graph = model.graph
    if not any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        _rename(graph)
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:], graph.quantization_annotation[:]
    del model.metadata_props[:], graph.metadata_props[:]
    graph.name, graph.doc_string, model.doc_string = "graph", "", ""
    return model.SerializeToString(deterministic=True)


def _rename(graph: onnx.GraphProto) -> None:
    names = {v.name: v.name for v in [*graph.input, *graph.output]} | {"": ""}
    fresh = (name for name in map(_short, count()) if name not in names)
    given: dict[bytes, str] = {}
    tensors = []
    for tensor in graph.initializer:
        old, tensor.name = tensor.name, ""
        value = tensor.SerializeToString()
        if value in given and old not in names:
            names[old] = given[value]
            continue
        tensor.name = names[old] = old if old in names else next(fresh)
        given.setdefault(value, tensor.name)
        tensors.append(tensor)
    for node in graph.node:
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [
            names.get(name) or names.setdefault(name, next(fresh)) for name in node.output
        ]
        node.name = node.output[0]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _short(index: int) -> str:
    index, rest = divmod(index, 26)
    return ("" if index == 0 else _short(index - 1)) + chr(ord("a") + rest)
