"""The peer onnxruntime: com.microsoft's MultiHeadAttention and GroupQueryAttention on the CPU.

Each gets its own layout: query (batch, q_len, heads · dim), and past keys and values in one buffer
with the present ones, as its own generation keeps them. What is causal or a single query goes to
GroupQueryAttention, which is the faster of the two there, the rest to MultiHeadAttention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    NotImplemented,
)
from torch import Tensor

from ...call.masks import And, Causal, Window
from .inputs import Inputs
from .sides import Contestant, Refused

_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
_OPSET, _IR = 21, 10


def side(inputs: Inputs) -> Contestant:
    """The operator that fits; Refused where none does."""
    p = inputs.problem
    if p.dtype not in _TYPES:
        kinds = " and ".join(str(d).removeprefix("torch.") for d in _TYPES)
        raise Refused(f"its CPU operators take {kinds}")
    if p.backward:
        raise Refused("it has no backward pass")
    window = _window(inputs)
    try:
        if window is not None:
            return _group_query(inputs, window)
        if inputs.full and p.group == 1:
            return _multi_head(inputs)
    except (Fail, InvalidArgument, InvalidGraph, NotImplemented) as error:
        raise Refused(" ".join(str(error).split())) from error
    raise Refused(f"its operators have no such mask for {p.heads} heads of {p.kv_heads}")


def _window(inputs: Inputs) -> int | None:
    """The causal window, −1 for none; None where the mask is not causal."""
    mask = inputs.problem.mask
    if mask == Causal() or (inputs.full and inputs.problem.q_len == 1):
        return -1
    match mask:
        case And(left=Causal(), right=Window(n=n, ahead=0)):
            return n
    return None


def _multi_head(inputs: Inputs) -> Contestant:
    p = inputs.problem
    given = {name: _rows(t) for name, t in zip("qkv", inputs.tensors, strict=True)}
    node = {"op_type": "MultiHeadAttention", "num_heads": p.heads, "outputs": ["out"]}
    return _Session(inputs, node, given).side()


def _group_query(inputs: Inputs, window: int) -> Contestant:
    p = inputs.problem
    past = p.k_len - p.q_len
    query, key, value = inputs.tensors
    given = {"q": _rows(query), "k": _rows(key[:, :, past:]), "v": _rows(value[:, :, past:])}
    # One buffer for past and present: the operator writes the new keys behind the old ones. It is
    # torch's memory, as ours: numpy's own lies in huge pages, which are read faster.
    shared = {"past_k": _copied(key), "past_v": _copied(value)}
    lengths = {
        "last": np.full(p.batch, p.k_len - 1, np.int32),
        "total": np.array(p.k_len, np.int32),
    }
    node = {
        "op_type": "GroupQueryAttention", "num_heads": p.heads, "kv_num_heads": p.kv_heads,
        "local_window_size": window, "outputs": ["out", "present_k", "present_v"],
    }  # fmt: skip
    present = {"present_k": "past_k", "present_v": "past_v"}
    return _Session(inputs, node, given | shared | lengths, present).side()


class _Session:
    """One operator as a model, its inputs and outputs bound once."""

    def __init__(
        self,
        inputs: Inputs,
        node: dict[str, Any],
        given: dict[str, np.ndarray],
        shared: dict[str, str] | None = None,
    ) -> None:
        self.problem = p = inputs.problem
        kind = _TYPES[p.dtype]
        types = {np.dtype(np.int32): TensorProto.INT32}
        op, outputs = node.pop("op_type"), node.pop("outputs")
        graph = helper.make_graph(
            [helper.make_node(op, list(given), outputs, domain="com.microsoft", **node)],
            "attention",
            [
                helper.make_tensor_value_info(name, types.get(a.dtype, kind), a.shape)
                for name, a in given.items()
            ],
            [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it refuses is told once, by us
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a) for n, a in given.items()}
        self.out = np.empty((p.batch, p.q_len, p.heads * p.dim), given["q"].dtype)
        values["out"] = onnxruntime.OrtValue.ortvalue_from_numpy(self.out)
        self.bound = self.session.io_binding()
        for name in given:
            self.bound.bind_ortvalue_input(name, values[name])
        for name in outputs:
            self.bound.bind_ortvalue_output(name, values[(shared or {}).get(name, name)])
        self.kept = values, given  # the memory that is bound

    def side(self) -> Contestant:
        try:
            self.session.run_with_iobinding(self.bound)
        except RuntimeError as error:  # some of what it cannot do it says only now
            raise Refused(" ".join(str(error).split())) from error
        return Contestant(
            lambda: self.session.run_with_iobinding(self.bound), lambda _: self.read()
        )

    def read(self) -> dict[str, Tensor]:
        p = self.problem
        out = torch.from_numpy(self.out).view(p.batch, p.q_len, p.heads, p.dim)
        return {"out": out.transpose(1, 2).clone()}


def _copied(tensor: Tensor) -> np.ndarray:
    """A contiguous copy."""
    copied: np.ndarray = tensor.clone(memory_format=torch.contiguous_format).numpy()
    return copied


def _rows(tensor: Tensor) -> np.ndarray:
    """(batch, heads, length, dim) as (batch, length, heads · dim)."""
    rows: np.ndarray = tensor.transpose(1, 2).flatten(2).contiguous().numpy()
    return rows
