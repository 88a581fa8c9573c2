"""Label maps written as DICOM Segmentation objects (DICOM-SEG), which a PACS files beside the CT they belong to."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, BinaryIO

import highdicom as hd
import numpy as np
import pydicom
from pydicom import uid
from pydicom.config import RAISE
from pydicom.sr.codedict import codes
from pydicom.valuerep import validate_value

from surm_seg.dicom import Series
from surm_seg.errors import BadInput
from surm_seg.stream import Refuse, refusing
from surm_seg.terminology import colour, concept

logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)  # it quotes the patient's name where it is malformed

MAX_NAME = 64  # characters of a segment's label
SERIES_NUMBER = 1000  # beyond those that scanners count

_REFERENCE: list[Any] = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
    "ImagePositionPatient",
]  # fmt: skip
_STUDY = (  # must be there, but may be empty
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


def write(file: BinaryIO, labels: np.ndarray, names: Sequence[str], series: Series) -> None:
    """Write a label map as a binary DICOM-SEG that refers to the slices it was made from; raises BadInput.

    The patient's and the study's attributes are copied from the series, as the standard asks: by them a PACS files the
    object, so it identifies the patient as the CT does. What anonymising emptied stays empty; a study, series or frame
    of reference without UID gets one made from the slices' own. UIDs follow from content and series: writing twice
    gives the same object but for the time of writing.

    Every organ is described, also one without voxels, so that segment number = label value. Frames without voxels are
    left out, except where all labels lie in fewer than two slices: then the first, the last and that slice are
    written for every organ, because a file needs frames, and one alone does not say how the slices are stacked.

    Args:
        labels: uint8 (i, j, k) on the grid of the series.
        names: organs; label value = position + 1.
    """
    refuse = refusing(series.path)
    assert labels.shape == series.header.shape and labels.dtype == np.uint8 and labels.max() <= len(names)
    check_names(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            buffer = io.BytesIO()
            _segmentation(labels, names, _sources(series, refuse)).save_as(buffer, enforce_file_format=True)
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # pydicom and highdicom fail on damage with whatever their converters raise
            sentence = "has headers that a segmentation cannot take over; export it again, or write NIfTI"
            raise BadInput("bad-header", f"{series.path} {sentence}.") from error
    file.write(buffer.getbuffer())


def _sources(series: Series, refuse: Refuse) -> list[pydicom.Dataset]:
    """What highdicom needs to know of every slice, and of the first also whose it is, with the gaps closed."""
    paths = [one.path for one in series.slices]
    found: list[pydicom.Dataset] = [
        pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_REFERENCE) for path in paths
    ]
    for one in found:
        for keyword in ("SOPClassUID", "SOPInstanceUID"):
            if not one.get(keyword):
                setattr(one, keyword, one.file_meta.get(f"MediaStorage{keyword}", ""))
    instances = [str(one.SOPInstanceUID) for one in found]
    if len({*instances} - {""}) < len(instances):
        refuse("bad-header", "has slices without a SOPInstanceUID of their own, to refer to; write NIfTI")
    first = pydicom.dcmread(paths[0], stop_before_pixels=True)
    first.decode()
    for keyword in _STUDY:
        if not _valid(first, keyword):
            setattr(first, keyword, "")
    first.SOPClassUID = found[0].SOPClassUID
    step = round(float(series.header.fields["pixdim"][3]), 6)
    common: dict[str, Any] = {keyword: first[keyword].value for keyword in ("Rows", "Columns", "PixelSpacing")}
    common |= {"ImageOrientationPatient": first.ImageOrientationPatient}
    common |= {"SliceThickness": step, "SpacingBetweenSlices": step}  # of overlapping slices the CT's own is larger
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        stated = {str(one.get(keyword) or "") for one in found} - {""}
        if len(stated) > 1:
            refuse("inconsistent-series", f"has slices that differ in {keyword}; export it again")
        common[keyword] = stated.pop() if stated else uid.generate_uid(entropy_srcs=[keyword, *instances])
    found[0] = first
    for one, instance in zip(found, instances, strict=True):
        for keyword, value in (*common.items(), ("SOPInstanceUID", instance)):
            setattr(one, keyword, value)
    return found


def check_names(names: Sequence[str]) -> None:
    """Raises BadInput for an organ that cannot be a segment's label."""
    for name in names:
        if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip() and "\\" not in name):
            raise BadInput("organ-name", f"{name[:80]!r} cannot name a DICOM segment; use 1 to 64 plain characters.")


def _valid(dataset: pydicom.Dataset, keyword: str) -> bool:
    """Whether the attribute is there and as the standard has it."""
    if keyword not in dataset:
        return False
    element = dataset[keyword]
    try:
        validate_value(element.VR, element.value, RAISE)
    except ValueError:
        return False
    return keyword != "PatientSex" or element.value in ("M", "F", "O", "")


def _segmentation(labels: np.ndarray, names: Sequence[str], sources: list[pydicom.Dataset]) -> hd.seg.Segmentation:
    occupied = np.flatnonzero(labels.any(axis=(0, 1))).tolist()
    kept = occupied if len(occupied) > 1 else sorted({0, *occupied, len(sources) - 1})
    program = version("surm-seg")
    family = codes.DCM.ArtificialIntelligence
    algorithm = hd.AlgorithmIdentificationSequence("surm-seg", family, program, source="surm-seg")
    content = hashlib.sha256(labels.tobytes()).hexdigest()
    origin = [content, program, "\\".join(names), *(str(one.SOPInstanceUID) for one in sources)]
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=np.ascontiguousarray(labels[:, :, kept].transpose(2, 1, 0)),
        plane_positions=[hd.PlanePositionSequence("PATIENT", sources[k].ImagePositionPatient) for k in kept],
        omit_empty_frames=len(occupied) > 1,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(n, name, algorithm) for n, name in enumerate(names, 1)],
        series_instance_uid=uid.generate_uid(entropy_srcs=["series", *origin]),
        sop_instance_uid=uid.generate_uid(entropy_srcs=["instance", *origin]),
        series_number=SERIES_NUMBER,
        instance_number=1,
        series_description="surm-seg segmentation",
        content_label="SEGMENTATION",
        manufacturer="surm-seg",
        manufacturer_model_name="surm-seg",
        software_versions=program,
        device_serial_number=program,
        specific_character_set="ISO_IR 192",  # UTF-8, which holds whatever the names and the source hold
    )


def _description(number: int, name: str, algorithm: hd.AlgorithmIdentificationSequence) -> hd.seg.SegmentDescription:
    category, kind, side = concept(name)
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor(*colour(number)),
    )
    if side is not None:
        modifiers = [hd.sr.CodedConcept.from_code(side)]
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = modifiers
    return description
