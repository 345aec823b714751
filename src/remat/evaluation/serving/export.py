"""ONNX forms: exported as float32, and quantized to int8, dynamically and with calibration."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from remat.errors import MissingPackageError, WorkloadError
from remat.evaluation.serving.forms import Form, quiet
from remat.evaluation.serving.request import Request
from remat.evaluation.serving.resident import open_session, resident_growth

ONNX, ONNX_DYNAMIC, ONNX_STATIC = "onnx", "onnx int8 dynamic", "onnx int8 static"

# Any: ONNX Runtime has no stubs, and answers are the user's own types.


def require_export() -> None:
    """Fail where a package of the exports is missing.

    Raises
    ------
    MissingPackageError: with the install command.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(error.name or "onnx", "export", "Exporting to ONNX") from error


class Exporter:
    """One model as an ONNX file in `folder`, and its quantized forms beside it."""

    def __init__(self, model: nn.Module, request: Request, folder: Path) -> None:
        self._model = model
        # One row is taken for a constant, and a batch that is not cut shares its number with it.
        self._request = request.of(max(2, request.num_examples))
        self._folder = folder
        self._call = _Call(model, self._request)

    def float32(self) -> Form:
        """Export the model, its batch open.

        Raises
        ------
        MissingPackageError, WorkloadError: if a package is missing or the model is not on the CPU;
            torch's own errors where it cannot be exported.
        """
        require_export()
        if any(parameter.device.type != "cpu" for parameter in self._model.parameters()):
            raise WorkloadError("exported forms are measured for models on the CPU only.")
        flat = self._call.inputs(self._request)
        open_batch = tuple(
            {0: torch.export.Dim.DYNAMIC} if self._request.counts_examples(tensor) else {}
            for tensor in flat
        )
        path = self._folder / "model.onnx"
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                self._call.flat_model(), tuple(flat), dynamo=True, dynamic_shapes=(open_batch,),
                input_names=[f"input_{i}" for i in range(len(flat))], verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(os.fspath(path))
        return self._form(ONNX, path)

    def dynamic_int8(self) -> Form:
        """Quantize the exported weights to int8, activations as they come."""
        path = self._folder / "dynamic.onnx"
        with quiet():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(self._exported(), path, weight_type=QuantType.QInt8)
        return self._form(ONNX_DYNAMIC, path)

    def static_int8(self, calibration: Sequence[Request]) -> Form:
        """Quantize weights and activations to int8, ranges as seen on the requests given."""
        path = self._folder / "static.onnx"
        with quiet():
            from onnxruntime.quantization import QuantType, quantize_static

            reader = _Reader(self._call.feed(request) for request in calibration)
            quantize_static(
                self._exported(), path, reader, weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8, per_channel=True,
            )  # fmt: skip
        examples = sum(request.num_examples for request in calibration)
        return self._form(ONNX_STATIC, path, f"Calibrated on {examples} training examples.")

    def _exported(self) -> Path:
        path = self._folder / "model.onnx"
        if not path.exists():
            raise WorkloadError("there is no exported model to quantize.")
        return path

    def _form(self, name: str, path: Path, message: str = "") -> Form:
        files = self._folder.glob(f"{path.name}*")  # large weights lie in a file beside
        threads = torch.get_num_threads()  # as many as torch is measured with
        served = _Served(open_session(path, threads), self._call)
        return Form(
            name=name,
            module=served,
            start=lambda: _Served(open_session(path, threads), self._call),
            size_bytes=sum(file.stat().st_size for file in files),
            is_torch=False,
            resident_bytes=lambda request: resident_growth(path, served.feed(request), threads),
            message=message,
        )


class _Call:
    """How arguments become the file's inputs, and its outputs the answer.

    What an answer holds beside tensors, such as a cache, is `None` in that of an exported model.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self._model = model
        leaves, self._spec = tree_flatten((request.args, request.kwargs))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        answer, self._answer_spec = tree_flatten(request.send(model))
        self._answered = [i for i, leaf in enumerate(answer) if isinstance(leaf, Tensor)]
        self._num_answered = len(answer)
        if not self._answered:
            raise WorkloadError("the model's answer holds no tensor.")

    def inputs(self, request: Request) -> list[Tensor]:
        """List the tensors of a request, which must have the form of the one exported.

        Raises
        ------
        WorkloadError: if it has other arguments.
        """
        leaves, spec = tree_flatten((request.args, request.kwargs))
        if spec != self._spec:
            raise WorkloadError("an exported model takes only the arguments it was exported with.")
        return [leaves[place] for place in self._places]

    def feed(self, request: Request) -> dict[str, Any]:
        return {
            f"input_{i}": tensor.detach().cpu().numpy()
            for i, tensor in enumerate(self.inputs(request))
        }

    def answer(self, outputs: Sequence[Any]) -> Any:
        leaves: list[Any] = [None] * self._num_answered
        for place, output in zip(self._answered, outputs, strict=True):
            leaves[place] = torch.from_numpy(output)
        return tree_unflatten(leaves, self._answer_spec)

    def flat_model(self) -> nn.Module:
        return _Flat(self._model, self._spec, self._places, self._constants)


class _Flat(nn.Module):
    """The model as a function from tensors to a tuple of tensors."""

    def __init__(
        self, model: nn.Module, spec: TreeSpec, places: list[int], constants: list[Any]
    ) -> None:
        super().__init__()
        self.model, self.spec, self.places, self.constants = model, spec, places, constants

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        answer, _ = tree_flatten(self.model(*args, **kwargs))
        return tuple(leaf for leaf in answer if isinstance(leaf, Tensor))


class _Served(nn.Module):
    """An ONNX Runtime session that is called like the model that it came from."""

    def __init__(self, session: Any, call: _Call) -> None:
        super().__init__()
        self._session, self._call = session, call
        self._known = {entry.name for entry in session.get_inputs()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        request = Request(args=args, kwargs=kwargs, num_examples=1)
        return self._call.answer(self._session.run(None, self.feed(request)))

    def feed(self, request: Request) -> dict[str, Any]:
        """Name the inputs of a request; an argument that the model does not use is none."""
        given = self._call.feed(request)
        return {name: value for name, value in given.items() if name in self._known}


class _Reader:
    """Calibration data as ONNX Runtime asks for it: one feed at a time, then nothing."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)
