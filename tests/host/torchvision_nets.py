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


def settled(model):
    """`model` with the statistics of its own activations: without them a random deep network dies out."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def resnet18():
    return settled(torchvision.models.resnet18(weights=None))


def resnet50():
    return settled(torchvision.models.resnet50(weights=None))


def googlenet():
    return settled(torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False))
