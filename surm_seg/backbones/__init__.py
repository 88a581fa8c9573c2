"""Backbones: every module in this folder with a `Backbone` subclass is found by its names."""

import importlib
import pkgutil

from surm_seg.backbones.base import Backbone, Decoder, Segmenter, make, names

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Backbone", "Decoder", "Segmenter", "make", "names"]
