"""Makes ONNX files smaller without changing what they compute."""

from itertools import count
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

SPARSE = 0.1  # a tensor with at most this share of values that are not zero is stored sparse
MIN_VALUES = 256  # of a tensor; for smaller ones the added nodes take more than they save


def compact(model: "onnx.ModelProto") -> None:
    """Stores the weights of `model` in less space. Runtimes restore them when they load the file.

    Weights that are mostly zero are stored as indices and values. Weights that fp16 holds exactly
    are stored as fp16. Intermediate results get short names.
    """
    from onnx import numpy_helper

    shorten_names(model)
    for tensor in list(model.graph.initializer):
        weight = numpy_helper.to_array(tensor)
        if weight.dtype != np.float32 or weight.size < MIN_VALUES:
            continue
        if np.count_nonzero(weight) <= SPARSE * weight.size:
            store_sparse(model, tensor, weight)
        elif (weight == weight.astype(np.float16)).all():
            store_half(model, tensor, weight)


def shorten_names(model: "onnx.ModelProto") -> None:
    """Numbers the intermediate results and removes the names of nodes; there are no subgraphs."""
    graph = model.graph
    fixed = {each.name for each in (*graph.input, *graph.output, *graph.initializer)}
    numbers, names = count(), {"": ""}
    for node in graph.node:
        node.ClearField("name")
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                if name not in fixed:
                    values[i] = names.setdefault(name, f"v{next(numbers)}")
    del graph.value_info[:]


def store_half(model: "onnx.ModelProto", tensor: "onnx.TensorProto", weight: np.ndarray) -> None:
    """Stores a weight as fp16."""
    from onnx import TensorProto, helper, numpy_helper

    name, half = tensor.name, f"{tensor.name}.half"
    tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), half))
    model.graph.node.insert(0, helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))


def store_sparse(model: "onnx.ModelProto", tensor: "onnx.TensorProto", weight: np.ndarray) -> None:
    """Stores a weight as the indices and values of what is not zero."""
    from onnx import helper, numpy_helper

    name, (indices,) = tensor.name, np.nonzero(weight.flatten())
    parts = {
        "size": np.array([weight.size], np.int64),
        "indices": indices.astype(np.int32),
        "values": weight.flatten()[indices],
        "shape": np.array(weight.shape, np.int64),
    }
    model.graph.initializer.remove(tensor)
    for part, values in parts.items():
        model.graph.initializer.append(numpy_helper.from_array(values, f"{name}.{part}"))
    size, indices, values, shape = (f"{name}.{part}" for part in parts)
    zeros, flat = f"{name}.zeros", f"{name}.flat"
    nodes = [
        helper.make_node("ConstantOfShape", [size], [zeros]),
        helper.make_node("ScatterElements", [zeros, indices, values], [flat]),
        helper.make_node("Reshape", [flat, shape], [name]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
