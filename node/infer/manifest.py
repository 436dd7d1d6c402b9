"""`dicom.yaml`: what a packaged model does not say and a DICOM node must know of it, as typed values.

Types only; `node.infer.package` reads the file. The user's description of every field is `docs/models.md`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from node.dicom.codes import Code
from node.dicom.conditions import When
from node.infer.packagings import Adapter, Command, Network, NnUNet, Orientation
from node.yamlfile import Number, Section, WholeNumber


def _parse_code(value: object) -> Code:
    """A code triplet as `[SCT, 39607008, Lung]` writes it (PS3.3 8.8: SH, SH, LO)."""
    shape = "expected [scheme, value, meaning], such as [SCT, 39607008, Lung]"
    if not isinstance(value, list | tuple) or len(value) != len(Code._fields):
        raise ValueError(f"found {f'{len(value)} items' if isinstance(value, list | tuple) else repr(value)}; {shape}")
    if not all(isinstance(part, str | int) and not isinstance(part, bool) for part in value):
        raise ValueError(f"found a part that is not text; {shape}, with quotes where a part could be read as a number")
    code = Code(*(str(part).strip() for part in value))
    for part, name, longest in zip(code, Code._fields, (16, 16, 64), strict=True):
        if not 1 <= len(part) <= longest or "\\" in part or not part.isprintable():
            raise ValueError(
                f"found {part!r} as the code's {name}; expected 1 to {longest} characters without a backslash"
            )
    return code


CodeTriplet = Annotated[Code, PlainValidator(_parse_code)]
CIELabTriplet = tuple[
    Annotated[Number, Field(ge=0, le=100)],
    Annotated[Number, Field(ge=-128, le=127)],
    Annotated[Number, Field(ge=-128, le=127)],
]


Positive = Annotated[Number, Field(gt=0)]


class Rank(StrEnum):
    """How candidates for an input are ranked; the first rule that tells two volumes apart decides."""

    THINNEST = "thinnest"  # smallest distance between slices
    SOFTEST_KERNEL = "softest kernel"  # lowest sharpness of ConvolutionKernel where known
    MOST_SLICES = "most slices"
    NEWEST = "newest"  # latest acquisition


class Limits(Section):
    """What an input must satisfy; anything else is refused with a sentence, never run."""

    slices_min: WholeNumber = Field(default=1, ge=1)
    spacing_max_mm: Number | None = Field(default=None, gt=0)  # the largest of the three spacings
    coverage_min_mm: Number | None = Field(default=None, gt=0)  # extent along the slice normal
    age_min_years: Number | None = Field(default=None, ge=0)
    age_max_years: Number | None = Field(default=None, gt=0)
    contrast: bool | None = None  # whether a contrast agent must (true) or must not (false) have been given


class Input(Section):
    """One input of the model: which series it wants and how to choose among candidates."""

    kind: Literal["volume", "image"] = "volume"  # slices in patient space, or frames of a planar image
    when: When = Field(default_factory=When)  # conditions on DICOM keywords
    rank: tuple[Rank, ...] = (Rank.THINNEST, Rank.SOFTEST_KERNEL, Rank.MOST_SLICES)
    limits: Limits = Field(default_factory=Limits)
    orientation: Orientation | None = None  # turned so before the bundle sees it; None: as it was acquired
    spacing_mm: tuple[Positive, Positive, Positive] | None = None  # x, y, z of that orientation: resampled so before
    rgb: bool = False  # an image as 8 bit RGB in its display window, as a JPEG of it would be
    onto_first: bool = False  # resample this input onto the grid of the first one
    registered: bool = False  # ... after a rigid registration, where its frame of reference is another one

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        other = ("rgb",) if self.kind == "volume" else ("orientation", "spacing_mm", "onto_first", "registered")
        if said := [name for name in other if getattr(self, name)]:
            raise ValueError(f"{said[0]} means nothing for an input of kind {self.kind}")
        if self.registered and not self.onto_first:
            raise ValueError("registered means nothing without onto_first: true")
        return self


class Finding(Section):
    """What a label or class of the model's output means (PS3.3 C.8.20.2, PS3.16 CID 7150, 7151)."""

    name: str = Field(min_length=1, max_length=64)  # SegmentLabel is LO
    category: CodeTriplet = Code("SCT", "91723000", "Anatomical Structure")
    type: CodeTriplet
    laterality: Literal["left", "right", "both", "unpaired"] | None = None
    anatomic_region: CodeTriplet | None = None


class Segment(Finding):
    """What one label of the label map means, how it is drawn, and whether its parts are findings of their own."""

    color_cielab: CIELabTriplet | None = None
    each_lesion: bool = False  # every connected part of the label is a segment of its own
    lesion_min_ml: Positive | None = None  # ... from this volume on; smaller ones are left out

    @model_validator(mode="after")
    def _check_lesions(self) -> Self:
        if self.lesion_min_ml is not None and not self.each_lesion:
            raise ValueError("lesion_min_ml means nothing without each_lesion: true")
        return self


class Task(StrEnum):
    """What kind of result the model gives."""

    SEGMENTATION = "segmentation"  # a label map: `segments` say what its values mean
    DETECTION = "detection"  # boxes with scores: `classes`
    CLASSIFICATION = "classification"  # scores: `classes`
    LANDMARKS = "landmarks"  # points: `classes`
    OBJECTS = "objects"  # finished DICOM objects, which mean what they say: neither


class Measurement(StrEnum):
    """What is measured of each segment; what needs a volume or a planar image is measured of no other."""

    VOLUME = "volume"  # mL, the sum of its voxels; of volumes only
    MESH_VOLUME = "mesh volume"  # mL, within the mesh halfway between voxels inside and outside; of volumes only
    SURFACE_AREA = "surface area"  # mm2, of that mesh; of volumes only
    AREA = "area"  # mm2, or pixels where their size is not known; of each frame of planar images only
    LONGEST_DIAMETER = "longest diameter"  # mm, within one slice or frame
    PERPENDICULAR_DIAMETER = "perpendicular diameter"  # mm, the longest at right angles to it there
    MAXIMUM_3D_DIAMETER = "maximum 3D diameter"  # mm, between any two corners of the mesh; of volumes only
    MEAN = "mean"  # of the image's values, in its unit
    STANDARD_DEVIATION = "standard deviation"
    MINIMUM = "minimum"
    PERCENTILE_5 = "percentile 5"
    PERCENTILE_10 = "percentile 10"
    PERCENTILE_25 = "percentile 25"
    MEDIAN = "median"
    PERCENTILE_75 = "percentile 75"
    PERCENTILE_90 = "percentile 90"
    PERCENTILE_95 = "percentile 95"
    MAXIMUM = "maximum"


# Which share of a segment's values lies at or below, in percent.
PERCENTILES = {
    Measurement.PERCENTILE_5: 5,
    Measurement.PERCENTILE_10: 10,
    Measurement.PERCENTILE_25: 25,
    Measurement.MEDIAN: 50,
    Measurement.PERCENTILE_75: 75,
    Measurement.PERCENTILE_90: 90,
    Measurement.PERCENTILE_95: 95,
}
OF_THE_MESH = (Measurement.MESH_VOLUME, Measurement.SURFACE_AREA, Measurement.MAXIMUM_3D_DIAMETER)
OF_VOLUMES = (Measurement.VOLUME, *OF_THE_MESH)  # and of no planar image
DIAMETERS = (Measurement.LONGEST_DIAMETER, Measurement.PERPENDICULAR_DIAMETER)
OF_VALUES = (
    Measurement.MEAN,
    Measurement.STANDARD_DEVIATION,
    Measurement.MINIMUM,
    Measurement.MAXIMUM,
    *PERCENTILES,
)


class Explanation(Section):
    """How the map is made that says where a classifier's score came from (`node.infer.saliency`)."""

    patches: WholeNumber = Field(default=8, ge=2, le=32)  # along each axis, each overlapping the next one by half
    fill: Literal["local mean", "background"] = "local mean"  # what stands in a patch's place; background: the minimum
    frames: WholeNumber = Field(default=1, ge=1, le=32)  # of an image judged frame by frame: the most certain ones
    runs_max: WholeNumber = Field(default=600, ge=4, le=20_000)  # of the model; more patches than that are made fewer
    timeout_s: Number = Field(default=600, gt=0)  # after which the map is given up


class BoxKeys(Section):
    """Where a bundle's detections stand in its output, and in what terms."""

    box: str = "box"  # key of the boxes (n, 6)
    label: str = "label"  # key of their classes (n)
    score: str = "label_scores"  # key of their scores (n)
    mode: Literal["cccwhd", "xyzxyz"] = "cccwhd"  # centre and size, or two corners
    space: Literal["lps", "image"] = "lps"  # patient millimetres, or voxels of the image that the network saw


_SECTIONS = {
    Adapter.MONAI_BUNDLE: "",
    Adapter.TORCHSCRIPT: "network",
    Adapter.TORCH_EXPORT: "network",
    Adapter.NNUNET: "nnunet",
    Adapter.COMMAND: "command",
}
_TASKS = {
    Adapter.TORCHSCRIPT: (Task.SEGMENTATION, Task.CLASSIFICATION),
    Adapter.TORCH_EXPORT: (Task.SEGMENTATION, Task.CLASSIFICATION),
    Adapter.NNUNET: (Task.SEGMENTATION,),
    Adapter.COMMAND: (Task.SEGMENTATION, Task.OBJECTS),
}


# What only bundles read: another adapter would pass it over, and the model see something else than its package says.
_OF_BUNDLES = ("overrides", "data", "item", "output", "background", "activation", "exclusive", "boxes")
_PRESENTED = ("orientation", "spacing_mm", "rgb")


class Manifest(Section):
    """One model package's `dicom.yaml`."""

    title: str = Field(min_length=1, max_length=64)
    adapter: Adapter = Adapter.MONAI_BUNDLE
    version: str | None = Field(default=None, min_length=1, max_length=64)  # of a package that is no bundle
    intended_use: str = Field(min_length=1)
    licence_code: str = Field(min_length=1)
    licence_weights: str = Field(min_length=1)
    inputs: dict[str, Input] = Field(min_length=1)  # by the key of the bundle's data item
    overrides: dict[str, Any] = Field(default_factory=dict)  # bundle ids set before it runs, `inferer#overlap: 0.25`
    # Keys of the bundle's data item and the input in each, or several as channels; default: every input by its name.
    data: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    item: dict[str, Any] = Field(default_factory=dict)  # further keys of the data item, such as `label_prompt`
    output: str = "pred"  # the key of the bundle's result
    background: tuple[WholeNumber, ...] = ()  # label values that mean background, beside 0
    activation: Literal["none", "sigmoid", "softmax"] = "none"  # what makes probabilities of a classifier's output
    exclusive: bool = True  # whether exactly one class holds
    boxes: BoxKeys = Field(default_factory=BoxKeys)
    absent_within_px: Number = Field(default=0, ge=0)  # a landmark this near to the first pixel is none
    task: Task = Task.SEGMENTATION
    segments: dict[Annotated[int, Field(ge=1, le=65535)], Segment] = Field(default_factory=dict)
    classes: dict[Annotated[int, Field(ge=0, le=65535)], Finding] = Field(default_factory=dict)
    score_min: Number = Field(default=0.5, ge=0, le=1)  # detections below it are left out, classes below it not found
    measurements: tuple[Measurement, ...] = (
        Measurement.VOLUME,
        Measurement.AREA,
        Measurement.MEAN,
        Measurement.STANDARD_DEVIATION,
    )
    # Values outside of it, both ends included, count for no measurement of values (re-segmentation of IBSI, 2.6).
    intensity_range: tuple[Number, Number] | None = None
    probabilities: bool = False  # whether a segmentation's probabilities are kept beside its labels
    saliency: Explanation | None = None  # a classifier's map of what its score came from; none: not made
    algorithm_family: CodeTriplet = Code("DCM", "123110", "Artificial Intelligence")
    timeout_s: Number = Field(default=1800, gt=0)
    network: Network | None = None  # of torchscript and torch-export
    nnunet: NnUNet | None = None  # of nnunet; none: its defaults
    command: Command | None = None  # of command

    @property
    def data_keys(self) -> dict[str, str | tuple[str, ...]]:
        """The bundle's data item: each key, and the input or inputs (as channels) that it gets."""
        return self.data or {name: name for name in self.inputs}

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        for key, names in self.data.items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in self.inputs:
                    raise ValueError(f"data.{key} names the input {name!r}; inputs has {', '.join(self.inputs)}")
        given = {name for names in self.data.values() for name in ((names,) if isinstance(names, str) else names)}
        if self.data and (unused := [name for name in self.inputs if name not in given]):
            raise ValueError(f"data gives the input {unused[0]!r} to nobody; every input stands in a key")
        return self

    @model_validator(mode="after")
    def _check_inputs(self) -> Self:
        (first, main), *others = self.inputs.items()
        if main.onto_first:
            raise ValueError(f"inputs.{first}.onto_first means nothing: it is the first input")
        if main.kind == "image" and (brought := [name for name, wanted in others if wanted.onto_first]):
            raise ValueError(f"inputs.{brought[0]}.onto_first needs a first input of kind volume, {first} is an image")
        volumes_only = self.task is Task.DETECTION or self.adapter is Adapter.NNUNET
        if self.adapter is Adapter.COMMAND:  # label maps come as NIfTI, which places them in space
            volumes_only = self.task is Task.SEGMENTATION
        if volumes_only and main.kind == "image":
            raise ValueError(f"a {self.task} by the adapter {self.adapter} needs a first input of kind volume")
        return self

    @model_validator(mode="after")
    def _check_meanings(self) -> Self:
        if self.task is Task.OBJECTS:
            if self.segments or self.classes:
                raise ValueError("segments and classes mean nothing for objects, which say themselves what they show")
            return self
        wanted, other = ("segments", "classes") if self.task is Task.SEGMENTATION else ("classes", "segments")
        if not getattr(self, wanted):
            raise ValueError(f"a {self.task} needs {wanted}: what the values of its output mean")
        if getattr(self, other):
            raise ValueError(f"{other} mean nothing for a {self.task}; it takes {wanted}")
        return self

    @model_validator(mode="after")
    def _check_measurements(self) -> Self:
        kinds = {wanted.kind for wanted in self.inputs.values()}
        if "measurements" in self.model_fields_set:
            other = OF_VOLUMES if kinds == {"image"} else (Measurement.AREA,) if kinds == {"volume"} else ()
            if said := [measurement for measurement in self.measurements if measurement in other]:
                of = "volumes" if kinds == {"image"} else "planar images"
                raise ValueError(f"measurements: {said[0]} is of {of}, and no input is one")
            if len(set(self.measurements)) < len(self.measurements):
                raise ValueError("measurements names one of them twice")
        if kinds == {"image"} and (said := [s.name for s in self.segments.values() if s.lesion_min_ml is not None]):
            raise ValueError(f"lesion_min_ml of {said[0]!r} means nothing in planar images, which have no volume")
        if self.intensity_range is not None and not self.intensity_range[0] < self.intensity_range[1]:
            raise ValueError("intensity_range is [lowest, highest], and the first must be the smaller")
        return self

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        own = _SECTIONS[self.adapter]
        if own in ("network", "command") and getattr(self, own) is None:
            raise ValueError(f"{own} is missing: the adapter {self.adapter} needs it")
        for section in ("network", "nnunet", "command"):
            if section != own and getattr(self, section) is not None:
                raise ValueError(f"{section} means nothing for the adapter {self.adapter}")
        if self.adapter is Adapter.MONAI_BUNDLE:
            if self.task is Task.OBJECTS:
                raise ValueError("a bundle makes no DICOM objects; the task objects belongs to the adapter command")
            if self.version is not None:
                raise ValueError("version stands in a bundle's configs/metadata.json, not in dicom.yaml")
            return self
        if self.version is None:
            raise ValueError(f"version is missing: a package for the adapter {self.adapter} says it nowhere else")
        if not self.version.isprintable():
            raise ValueError("version has characters that cannot be printed")
        if said := [name for name in _OF_BUNDLES if name in self.model_fields_set]:
            raise ValueError(f"{said[0]}: of bundles only, the adapter {self.adapter} does not read it")
        for name, wanted in self.inputs.items():
            passed_over = (*_PRESENTED, "onto_first", "registered") if self.command else _PRESENTED
            if said := [field for field in passed_over if getattr(wanted, field)]:
                where = f"; see {own}.{said[0]}" if own == "network" else ""
                raise ValueError(f"inputs.{name}.{said[0]}: the adapter {self.adapter} does not read it{where}")
        if self.task not in _TASKS[self.adapter]:
            raise ValueError(
                f"the adapter {self.adapter} has no task {self.task}; expected {' or '.join(_TASKS[self.adapter])}"
            )
        if self.network is not None:
            self._check_network(self.network)
        return self

    def _check_network(self, network: Network) -> None:
        kinds = {wanted.kind for wanted in self.inputs.values()}
        if len(kinds) > 1:
            raise ValueError("a bare network takes either volumes or images; its inputs become its channels")
        if "image" in kinds and network.dimensions != 2:
            raise ValueError("an input of kind image needs network.dimensions: 2")
        if self.task is Task.CLASSIFICATION:
            if "volume" in kinds and network.dimensions != 3:
                raise ValueError("a classification of volumes needs network.dimensions: 3")
            if network.roi is not None:
                raise ValueError("a classification sees the whole image: no network.roi")

    @model_validator(mode="after")
    def _check_maps(self) -> Self:
        if self.saliency is not None and self.task is not Task.CLASSIFICATION:
            raise ValueError(f"saliency means nothing for a {self.task}: it says where a classifier's score came from")
        if not self.probabilities:
            return self
        if self.task is not Task.SEGMENTATION:
            raise ValueError(f"probabilities mean nothing for a {self.task}: they are of a segmentation's labels")
        if self.adapter is Adapter.COMMAND:
            raise ValueError("probabilities are not available from the adapter command, which returns labels only")
        return self

    @property
    def label_names(self) -> dict[int, str]:
        """Label value to the segment's name."""
        return {value: segment.name for value, segment in self.segments.items()}
