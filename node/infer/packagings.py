"""The sections of `dicom.yaml` that say how to run a packaging which does not say it itself.

Types only, as in `node.infer.manifest`, which holds them. The user's description of every field is `docs/models.md`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from node.yamlfile import Number, Section, WholeNumber

_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/-]*@sha256:[0-9a-f]{64}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class Adapter(StrEnum):
    """How a model is packaged, and so what runs it."""

    MONAI_BUNDLE = "monai-bundle"  # configs/inference.* say how
    TORCHSCRIPT = "torchscript"  # `network` says how
    TORCH_EXPORT = "torch-export"  # `network` says how
    NNUNET = "nnunet"  # plans.json and dataset.json say how, `nnunet` which folds
    COMMAND = "command"  # a program or a container that reads and writes files: `command`


def _inside(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or not text.isprintable():
        raise ValueError(f"found {text!r}; expected a path inside the package, such as models/model.ts")
    return text


def _frame(text: str) -> str:
    if len(text) != 3 or any(sum(axis in pair for axis in text) != 1 for pair in ("LR", "AP", "IS")):
        raise ValueError(f"found orientation {text!r}; expected one of L R, A P and I S each, such as RAS")
    return text


Orientation = Annotated[str, AfterValidator(_frame)]
PathInside = Annotated[str, Field(min_length=1), AfterValidator(_inside)]
Range = tuple[Number, Number]
Size = Annotated[tuple[Annotated[WholeNumber, Field(ge=1)], ...], Field(min_length=2, max_length=3)]


class IntensityStep(Section):
    """One step on the values of the image; exactly one of its kinds. `to` belongs to the two that scale."""

    clip: Range | None = None  # values outside are set to the nearer end
    clip_percentiles: Range | None = None  # the same between two percentiles of the channel's values
    scale: Range | None = None  # this range becomes the range `to`; values outside stay outside
    scale_percentiles: Range | None = None  # the same with percentiles; [0, 100] are the minimum and the maximum
    to: Range = (0.0, 1.0)
    normalise: Literal["all", "nonzero"] | None = None  # mean 0 and standard deviation 1 of these voxels of a channel
    mean: tuple[Number, ...] | None = None  # subtracted, one for each channel, before ...
    standard_deviation: tuple[Annotated[Number, Field(gt=0)], ...] | None = None  # ... this is divided by

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        kinds = ("clip", "clip_percentiles", "scale", "scale_percentiles", "normalise", "mean")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'no step'}; expected one of {', '.join(kinds)}")
        for name in ("clip", "clip_percentiles", "scale", "scale_percentiles", "to"):
            ends = getattr(self, name)
            if ends is not None and ends[0] >= ends[1]:
                raise ValueError(f"found {name}: [{ends[0]:g}, {ends[1]:g}]; expected the smaller number first")
            if ends is not None and name.endswith("percentiles") and not 0 <= ends[0] < ends[1] <= 100:
                raise ValueError(f"found {name}: [{ends[0]:g}, {ends[1]:g}]; expected percentiles from 0 to 100")
        if (self.mean is None) != (self.standard_deviation is None):
            raise ValueError("mean and standard_deviation stand together, each a list with a number for each channel")
        if self.mean and self.standard_deviation and len(self.mean) != len(self.standard_deviation):
            raise ValueError("mean and standard_deviation are lists of the same length")
        return self


class Network(Section):
    """What happens before and after a bare network (TorchScript, torch.export), which says nothing of it itself."""

    file: PathInside  # the network, in the package
    dimensions: Literal[2, 3] = 3  # 2: slice by slice, or planar images
    orientation: Orientation = "RAS"  # towards which the axes of the array grow
    spacing_mm: tuple[Annotated[Number, Field(gt=0)], ...] | None = None  # along those axes; none: as acquired
    intensity: tuple[IntensityStep, ...] = ()
    size: Size | None = None  # what the image becomes, by `fit`, before it reaches the network
    fit: Literal["pad or crop", "resize"] = "pad or crop"
    rgb: bool = False  # planar images: three channels, which a grey image is repeated to
    transpose: bool = False  # planar images: columns before rows, as MONAI's readers give them
    roi: Size | None = None  # the window that the network sees at once; none: the whole image
    overlap: Number = Field(default=0.25, ge=0, lt=1)
    blending: Literal["constant", "gaussian"] = "gaussian"
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    decision: Literal["argmax", "threshold"] = "argmax"
    threshold: Number = 0.5
    back: Literal["linear", "nearest"] = "linear"  # how a resampled result returns to the input's grid

    @model_validator(mode="after")
    def _check_axes(self) -> Self:
        for name in ("size", "roi"):
            value = getattr(self, name)
            if value is not None and len(value) != self.dimensions:
                raise ValueError(f"found {name} with {len(value)} numbers; expected {self.dimensions} (dimensions)")
        if self.spacing_mm is not None and len(self.spacing_mm) != 3:
            raise ValueError(f"found spacing_mm with {len(self.spacing_mm)} numbers; expected 3")
        return self


class NnUNet(Section):
    """Which part of an nnU-Net v2 trained folder runs."""

    folder: str = "."  # the folder with plans.json and dataset.json, in the package
    folds: Annotated[tuple[Annotated[str, Field(pattern=r"^([0-9]|all)$")], ...], Field(min_length=1)] = ("0",)
    checkpoint: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+\.pth$")] = "checkpoint_final.pth"
    # Towards which the axes of the files grew that it was trained on; none where the trainer's reader made that RAS.
    orientation: Orientation | None = None
    step: Number = Field(default=0.5, gt=0, le=1)  # of the sliding window, in windows
    mirroring: bool = True  # mean over mirrored images, which the checkpoint may allow: better, up to 8 times slower

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        _inside(self.folder)
        return self


class Command(Section):
    """A program or a container that reads DICOM files from one folder and writes its results into another."""

    run: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # the program and its arguments
    image: str | None = None  # or the container, by digest
    arguments: tuple[str, ...] = ()  # of the container
    entrypoint: str | None = None  # in place of the container's own; "" for none
    engine: Literal["docker", "podman"] = "docker"
    layout: Literal["mercure", "map"] = "mercure"  # where a container finds its folders
    file: PathInside | None = None  # a segmentation's label map in the out-folder; none: its only NIfTI file
    settings: dict[str, Any] = Field(default_factory=dict)  # of task.json, for mercure modules
    environment: dict[str, str] = Field(default_factory=dict)
    output_max_mb: Number = Field(default=4096, gt=0)  # that it may write, work files included
    memory_gb: Number | None = Field(default=None, gt=0)  # of a container
    shared_memory_gb: Number | None = Field(default=None, gt=0)  # of a container

    @model_validator(mode="after")
    def _check_way(self) -> Self:
        if (self.run is None) == (self.image is None):
            raise ValueError("expected either run (a program) or image (a container)")
        if self.image is not None and not _IMAGE.fullmatch(self.image):
            raise ValueError(f"found {self.image!r}; expected an image by its digest, such as name@sha256:<64 digits>")
        if self.run is not None and (self.arguments or self.entrypoint is not None):
            raise ValueError("arguments and entrypoint belong to image; run holds the program and its arguments")
        wrong = [name for name in self.environment if not _VARIABLE.fullmatch(name)]
        if wrong:
            raise ValueError(f"found the variable {wrong[0]!r}; expected letters, digits and '_'")
        return self
