"""Structured parameter-efficient fine-tuning, first for medical segmentation; importing it registers the PEFT tuner."""

from surm_seg.structures import Structure, make, names
from surm_seg.tuner import SurmConfig

__all__ = ["Structure", "SurmConfig", "make", "names"]
