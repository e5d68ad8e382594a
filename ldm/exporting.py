"""Classifiers as ONNX files, checked in onnxruntime."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.models.classifier import Classifier
from ldm.modules.classifiers.augment import views
from ldm.recognition import Reader
from ldm.util import UserError

TOLERANCE = 1e-4  # largest difference of a probability
MISSING = "exporting needs the packages onnx, onnxruntime and onnxscript: pip install 'ldm[export]'"


class Probabilities(nn.Module):
    """What the file computes: images [B, C, H, W] in [-1, 1] -> probabilities [B, classes].

    The recipe's `predict` without the recipe, of which the exporter understands nothing.
    """

    def __init__(self, recipe: Classifier) -> None:
        super().__init__()
        self.net, self.kind, self.normalized = recipe.model, recipe.test_views, recipe.normalized
        self.register_buffer("scale", recipe.pixel_scale)
        self.register_buffer("shift", recipe.pixel_shift)

    def forward(self, images: Tensor) -> Tensor:
        x = images * self.scale + self.shift if self.normalized else images
        logits = [self.net(view) * weight for view, weight in views(x, self.kind)]
        return torch.stack(logits).sum(0).softmax(1)


def export(reader: Reader, path: Path) -> float:
    """Writes the ONNX file (input `images`, any batch size; class names, size and range in its metadata).

    Returns:
        the largest difference of a probability between torch and onnxruntime, over batches of one and three images.

    Raises:
        UserError: packages are missing, the network cannot be exported, or onnxruntime refuses the file or gives other
            answers. Nothing is left of the file then, and an older one of that name stays as it was.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as e:
        raise UserError(f"{MISSING} (there is no {e.name})") from e
    assert reader.fit.size is not None
    shape = (reader.fit.channels, *reader.fit.size)
    net = Probabilities(reader.model.cpu().eval())
    notes = {"classes": json.dumps(reader.names), "range": "[-1, 1]", "size": "x".join(map(str, reader.fit.size))}
    unchecked = path.with_name(f".{path.name}.{os.getpid()}.onnx")
    try:
        task = "torch cannot export"
        write(net, unchecked, shape, notes)
        task = "onnxruntime cannot run"
        difference = max(compare(net, unchecked, n, shape) for n in (1, 3))
        if difference <= TOLERANCE:
            os.replace(unchecked, path)
            return difference
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}); choose another place with --onnx") from e
    except Exception as e:  # torch.onnx and onnxruntime each raise classes of their own
        name = type(reader.model.model).__name__
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(
            f"{path}: {task} the {name} ({reason[:200]}); no file was written. "
            "Try another version of torch, onnxscript or onnxruntime, or another network"
        ) from e
    finally:
        unchecked.unlink(missing_ok=True)
    raise UserError(
        f"{path}: onnxruntime differs by {difference:.2g}, expected at most {TOLERANCE}; no file was written. "
        "Try another version of torch, onnxscript or onnxruntime"
    )


def write(net: nn.Module, path: Path, shape: tuple[int, ...], notes: dict[str, str]) -> None:
    """The ONNX file of a network of images [B, *shape], any B, with `notes` as its metadata."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.rand(2, *shape) * 2 - 1,),
            str(path),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        )
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, notes)
    onnx.save(model, str(path))


@torch.no_grad()
def compare(net: nn.Module, path: Path, n: int, shape: tuple[int, ...]) -> float:
    """The largest difference of a probability over `n` random images."""
    import onnxruntime

    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(n)) * 2 - 1
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"images": x.numpy()})
    return float((net(x) - torch.from_numpy(theirs)).abs().max())
