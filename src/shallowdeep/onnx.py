"""Steps and networks as ONNX graphs with a free batch size, or for one row.

It refuses to know who runs them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from shallowdeep.graph import silence, told
from shallowdeep.steps import Joined, Step, export_step
from shallowdeep.types import BackendError, MissingExtra


def onnx_program(step: Step | Joined, example: Sequence[Tensor]) -> Any:
    """The ``onnx.ModelProto`` of ``step``; ``example`` are tensors in the order of ``step.takes``, two rows or more.

    Its inputs are named as ``step.takes``, its outputs as ``step.gives``, with "next." in front of names that are an
    input's, too. Raises ``MissingExtra``, and ``BackendError`` for what ONNX has no operator for.
    """
    if step in _MADE:
        return _MADE[step]
    for needed in ("onnx", "onnxscript"):
        if importlib.util.find_spec(needed) is None:
            raise MissingExtra(f"ONNX graphs need {needed}: pip install 'shallowdeep[export]'.")
    exported = export_step(step, example)
    try:
        with silence(), torch.no_grad():
            program = torch.onnx.export(
                exported,
                dynamo=True,
                input_names=list(step.takes),
                output_names=[f"next.{name}" if name in step.takes else name for name in step.gives],
                custom_translation_table={torch.ops.aten.scalar_tensor.default: _number},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise BackendError(f"The network cannot be an ONNX graph: {told(error)}.") from error
    assert program is not None
    made = _MADE[step] = program.model_proto  # built anew whenever asked for
    return made


def for_one_row(model: Any) -> Any:
    """A copy of ``model`` that takes one row: runtimes plan memory and layouts for shapes that they know."""
    fixed = type(model)()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        axes = value.type.tensor_type.shape.dim
        if axes and axes[0].dim_param:
            axes[0].dim_value = 1
    return fixed


def _number(s: float, dtype: int = 1, layout: str = "", device: str = "", pin_memory: bool = False) -> Any:
    """The exporter's own way puts every number down in float32, where a threshold next to 1 is 1."""
    from onnx import helper, numpy_helper
    from onnxscript import opset18

    return opset18.Constant(value=numpy_helper.from_array(np.array(s, helper.tensor_dtype_to_np_dtype(dtype))))


_MADE: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # several backends and numbers of threads ask
