"""torchvision's networks, random weights, from a wheel whose C++ operators may not fit this torch."""

import torch

# Its Python registers a fake for each operator when it is imported; where the C++ is missing, so is what
# they refer to. None of these networks calls one. Kept alive for as long as the module.
_schemas = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    try:
        _schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # the C++ is there

import torchvision  # noqa: E402


def resnet18():
    return torchvision.models.resnet18(weights=None)


def googlenet():
    # Its own initialisation lets activations vanish: every answer would be the same.
    return torchvision.models.googlenet(weights=None, init_weights=False)
