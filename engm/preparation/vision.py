"""torchvision, also where its compiled operators do not fit the torch beside it.

A CUDA build of torchvision beside a CPU build of torch stops at its import, because two operators
that it registers shapes for are missing. Data sets, transforms and models need neither of them, so
they are declared here, without a body, and the import is tried again.
"""

import torch

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    # kept in a module variable: the declarations vanish with the library object
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _declared.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
