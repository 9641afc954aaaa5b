"""Lets torchvision be imported where its compiled operators cannot be loaded (a build for CUDA beside a PyTorch without).

SGLang imports torchvision when it starts, whatever model it serves. Without its operators that import fails where it describes two of
them to PyTorch; here they are declared just before, and stay without an implementation. Where the operators load, nothing happens.
Python runs a file of this name at its start if it lies on the path. Knows nothing of SGLang.
"""

from __future__ import annotations

import importlib.abc
import sys

held = []  # a declaration ends with its library object


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; acts when torchvision, having tried to load its operators, comes to describe them."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            if not sys.modules["torchvision.extension"]._has_ops():
                declare()


def declare() -> None:
    import torch

    held.append(torch.library.Library("torchvision", "DEF"))
    for operator in ("nms", "qnms"):
        held[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
