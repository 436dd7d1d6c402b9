"""The manifests that ship for bundles of the MONAI Model Zoo: every label meant, sides right, codes that exist.

The bundles are not part of radnode: what their `configs/metadata.json` says of each label stands here, in the bundles'
own words (Project-MONAI/model-zoo at dfae206d).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from node.dicom.codes import Code
from node.errors import ManifestError
from node.infer.manifest import Finding, Manifest, Measurement, Task
from node.yamlfile import load_yaml

FOLDER = Path(__file__).parents[2] / "models" / "zoo"
MANIFESTS = {path.parent.name: load_yaml(path, Manifest, ManifestError) for path in FOLDER.glob("*/dicom.yaml")}


def numbered(*names: str, start: int = 1) -> dict[int, str]:
    return dict(enumerate(names, start))


def sided(*names: str, sides: tuple[str, str]) -> list[str]:
    return [f"{side} {name}" for name in names for side in sides]


SPINE = [f"vertebrae {region}{n}" for region, most in (("L", 5), ("T", 12), ("C", 7)) for n in range(most, 0, -1)]
RIBS = [f"{side} rib {n}" for side in ("left", "right") for n in range(1, 13)]
BONES = sided("humerus", "scapula", "clavicula", "femur", "hip", sides=("left", "right"))
MUSCLES = sided(
    "gluteus maximus", "gluteus medius", "gluteus minimus", "autochthon", "iliopsoas", sides=("left", "right")
)
WHOLE_BODY = numbered(
    *("spleen", "kidney right", "kidney left", "gallbladder", "liver", "stomach", "aorta", "inferior vena cava"),
    *("portal vein and splenic vein", "pancreas", "adrenal gland right", "adrenal gland left"),
    *("lung upper lobe left", "lung lower lobe left", "lung upper lobe right", "lung middle lobe right"),
    *("lung lower lobe right", *SPINE, "esophagus", "trachea", "heart myocardium", "heart atrium left"),
    *("heart ventricle left", "heart atrium right", "heart ventricle right", "pulmonary artery", "brain"),
    *sided("iliac artery", "iliac vena", sides=("left", "right")),
    *("small bowel", "duodenum", "colon", *RIBS, *BONES, "sacrum", "face", *MUSCLES, "urinary bladder"),
)
VISTA3D = numbered(
    *("liver", "kidney", "spleen", "pancreas", "right kidney", "aorta", "inferior vena cava", "right adrenal gland"),
    *("left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney", "bladder"),
    *("prostate or uterus", "portal vein and splenic vein", "rectum", "small bowel", "lung", "bone", "brain"),
    *("lung tumor", "pancreatic tumor", "hepatic vessel", "hepatic tumor", "colon cancer primaries"),
    *("left lung upper lobe", "left lung lower lobe", "right lung upper lobe", "right lung middle lobe"),
    *("right lung lower lobe", *SPINE, "trachea", *sided("iliac artery", "iliac vena", sides=("left", "right"))),
    *("colon", *RIBS, *BONES, "sacrum", *MUSCLES, "left atrial appendage", "brachiocephalic trunk"),
    *("left brachiocephalic vein", "right brachiocephalic vein", "left common carotid artery"),
    *("right common carotid artery", "costal cartilages", "heart", "left kidney cyst", "right kidney cyst"),
    *("prostate", "pulmonary vein", "skull", "spinal cord", "sternum", "left subclavian artery"),
    *("right subclavian artery", "superior vena cava", "thyroid gland", "vertebrae S1", "bone lesion", "kidney mass"),
    *("liver tumor", "vertebrae L6", "airway"),
)
# Its automatic mode leaves these out: unions of other classes, tumors and lesions, and what a prompt must ask for.
VISTA3D_NOT_ASKED = {2, 16, 18, 20, 21, 23, 24, 25, 26, 27, 128, 129, 130, 131, 132}
BRAIN = numbered(
    *("3rd Ventricle", "4th Ventricle", *sided("Accumbens Area", "Amygdala", sides=("Right", "Left")), "Brain Stem"),
    *sided(
        *("Caudate", "Cerebellum Exterior", "Cerebellum White Matter", "Cerebral White Matter", "Hippocampus"),
        *("Inf Lat Vent", "Lateral Ventricle", "Pallidum", "Putamen", "Thalamus Proper", "Ventral DC"),
        sides=("Right", "Left"),
    ),
    *("Cerebellar Vermal Lobules I-V", "Cerebellar Vermal Lobules VI-VII", "Cerebellar Vermal Lobules VIII-X"),
    *("Left Basal Forebrain", "Right Basal Forebrain"),  # the other way round than every other pair
    *sided(
        *("anterior cingulate gyrus", "anterior insula", "anterior orbital gyrus", "angular gyrus"),
        *("calcarine cortex", "central operculum", "cuneus", "entorhinal area", "frontal operculum", "frontal pole"),
        *("fusiform gyrus", "gyrus rectus", "inferior occipital gyrus", "inferior temporal gyrus", "lingual gyrus"),
        *("lateral orbital gyrus", "middle cingulate gyrus", "medial frontal cortex", "middle frontal gyrus"),
        *("middle occipital gyrus", "medial orbital gyrus", "postcentral gyrus", "precentral gyrus"),
        *("superior frontal gyrus", "middle temporal gyrus", "occipital pole", "occipital fusiform gyrus"),
        *("opercular part of the IFG", "orbital part of the IFG", "posterior cingulate gyrus", "precuneus"),
        *("parahippocampal gyrus", "posterior insula", "parietal operculum", "postcentral gyrus"),
        *("posterior orbital gyrus", "planum polare", "precentral gyrus", "planum temporale", "subcallosal area"),
        *("superior frontal gyrus", "supplementary motor cortex", "supramarginal gyrus", "superior occipital gyrus"),
        *("superior parietal lobule", "superior temporal gyrus", "temporal pole", "triangular part of the IFG"),
        "transverse temporal gyrus",
        sides=("Right", "Left"),
    ),
)
NUCLEI = ("Other", "Inflammatory", "Epithelial", "Spindle-Shaped")
EXPECTED = {
    "spleen_ct_segmentation": numbered("spleen"),
    "wholeBody_ct_segmentation": WHOLE_BODY,
    "multi_organ_segmentation": numbered(
        "artery", "portal vein", "liver", "spleen", "stomach", "gallbladder", "pancreas"
    ),
    "pancreas_ct_dints_segmentation": numbered("pancreas", "pancreatic tumor"),
    "swin_unetr_btcv_segmentation": numbered(
        *("Spleen", "Right Kidney", "Left Kidney", "Gallbladder", "Esophagus", "Liver", "Stomach", "Aorta"),
        *("inferior vena cava", "Portal and Splenic Veins", "Pancreas", "Right adrenal gland", "Left adrenal gland"),
    ),
    "pediatric_abdominal_ct_segmentation": numbered("liver", "spleen", "pancreas"),
    "renalStructures_UNEST_segmentation": numbered("kidney cortex", "medulla", "pelvicalyceal system"),
    "renalStructures_CECT_segmentation": numbered("artery", "vein", "ureter", "neoplasm", "parenchyma"),
    "lung_nodule_ct_detection": {0: "nodule"},
    "vista3d": {label: name for label, name in VISTA3D.items() if label not in VISTA3D_NOT_ASKED},
    "spleen_deepedit_annotation": numbered("spleen"),
    "brats_mri_segmentation": {1: "Tumor core", 2: "Whole tumor", 4: "Enhancing tumor"},
    "prostate_mri_anatomy": numbered("central gland", "peripheral zone"),
    "wholeBrainSeg_Large_UNEST_segmentation": BRAIN,
    "ventricular_short_axis_3label": numbered("left ventricular pool", "myocardium", "right ventricular pool"),
    "valve_landmarks": numbered(
        *("Mitral anterior in 2CH", "Mitral posterior in 2CH", "Mitral septal in 3CH", "Mitral free wall in 3CH"),
        *("Mitral septal in 4CH", "Mitral free wall in 4CH", "Aortic septal", "Aortic free wall"),
        *("Tricuspid septal", "Tricuspid free wall"),
        start=0,
    ),
    "breast_density_classification": numbered("A", "B", "C", "D", start=0),
    "endoscopic_inbody_classification": numbered("in body", "out body", start=0),
    "endoscopic_tool_segmentation": numbered("tools"),
    "pathology_nuclei_segmentation_classification": numbered(*NUCLEI),
    "pathology_nuclei_classification": numbered(*NUCLEI, start=0),
    "pathology_nuclick_annotation": numbered("Nuclei"),
    "pathology_tumor_detection": numbered("metastasis", start=0),
    "segmentation_template": numbered("category 1", "category 2", "category 3"),
    "classification_template": numbered("background", "circle", "triangle", "rectangle", start=0),
}

# SNOMED CT codes that pydicom does not know, by where they were found (docs/models-zoo.md).
# 3D Slicer's mapping of TotalSegmentator (lassoan/SlicerTotalSegmentator, totalsegmentator_snomed_mapping.csv).
SLICER = {
    "48535007": "First rib", "78247007": "Second rib", "25888004": "Third rib", "25523003": "Fourth rib",
    "15339008": "Fifth rib", "59558009": "Sixth rib", "24915002": "Seventh rib", "5953002": "Eighth rib",
    "22565002": "Ninth rib", "77644006": "Tenth rib", "58830002": "Eleventh rib", "43993008": "Twelfth rib",
    "181674001": "Gluteus maximus muscle", "78333006": "Gluteus medius muscle", "75297007": "Gluteus minimus muscle",
    "244849004": "Deep muscle of back", "68455001": "Iliopsoas muscle", "74281007": "Myocardium",
    "110765007": "Portal vein and splenic vein",
    "65985001": "S1 vertebra",  # lassoan/SlicerMONAIAuto3DSeg, SegmentationCategoryTypeModifier-MONAIAuto3DSeg
}  # fmt: skip
UBERON = {  # Uberon's cross-references (obophenotype/uberon 2026-04-01, uberon-bridge-to-sctid.owl)
    "29704000": "Renal parenchyma", "30737000": "Renal medulla", "110678003": "Fusiform gyrus",
    "279105006": "Cerebellar vermis", "279166005": "Superior frontal gyrus", "279167001": "Postcentral gyrus",
    "279168006": "Superior parietal cortex", "279182006": "Superior occipital gyrus",
    "279183001": "Inferior occipital gyrus", "279185008": "Supramarginal gyrus", "279186009": "Angular gyrus",
    "279190006": "Middle temporal gyrus", "279191005": "Inferior temporal gyrus", "279194002": "Medial orbital gyrus",
    "279195001": "Lateral orbital gyrus", "279196000": "Anterior orbital gyrus", "279197009": "Posterior orbital gyrus",
    "279199007": "Cuneus", "279200005": "Precuneus", "279203007": "Lingual gyrus", "279205000": "Parahippocampal gyrus",
    "279206004": "Gyrus rectus", "279208003": "Cingulate gyrus", "279371005": "Renal collecting system",
    "314144002": "Frontal pole", "314155002": "Temporal pole", "314159008": "Transverse temporal gyrus",
    "314160003": "Occipital pole", "362211004": "Renal cortex", "362332009": "Middle frontal gyrus",
    "362333004": "Inferior frontal gyrus", "362345008": "Superior temporal gyrus", "362351003": "Operculum of brain",
    "362352005": "Frontal operculum", "362353000": "Parietal operculum", "362357004": "Subcallosal area",
}  # fmt: skip

# Names that say what their code means in other words, or whose code is the broader concept; without their side.
IN_OTHER_WORDS = {f"rib {number}": code for number, code in enumerate(list(SLICER.values())[:12], 1)} | {
    "Tumor core without its enhancing part": "Non-Enhancing Lesion", "Enhancing tumor": "Enhancing Lesion",
    "Pancreatic tumor": "Neoplasm", "Metastasis": "Neoplasm, Secondary", "Surgical tools": "Instrument, device",
    "In body": "Internal", "Out of body": "External", "Parenchyma of the kidney": "Renal parenchyma",
    "Pelvicalyceal system": "Renal collecting system", "Small bowel": "Small intestine",
    "iliac artery": "Common iliac artery", "iliac vein": "Common iliac vein", "iliopsoas": "Iliopsoas muscle",
    "gluteus maximus": "Gluteus maximus muscle", "gluteus medius": "Gluteus medius muscle",
    "gluteus minimus": "Gluteus minimus muscle", "autochthonous muscle of back": "Deep muscle of back",
    "atrial appendage": "Left auricular appendage", "3rd ventricle": "Third ventricle",
    "4th ventricle": "Fourth ventricle", "accumbens area": "Nucleus accumbens", "caudate": "Caudate nucleus",
    "pallidum": "Globus pallidus", "ventral DC": "Ventral Diencephalon", "cerebellum exterior": "Cerebellar cortex",
    "inferior lateral ventricle": "Inferior horn of lateral ventricle", "entorhinal area": "Entorhinal Cortex",
    "superior parietal lobule": "Superior parietal cortex", "basal forebrain": "Telencephalon",
    "calcarine cortex": "Occipital lobe", "middle occipital gyrus": "Occipital lobe",
    "central operculum": "Operculum of brain", "medial frontal cortex": "Frontal lobe",
    "precentral gyrus": "Frontal lobe", "precentral gyrus, medial segment": "Frontal lobe",
    "supplementary motor cortex": "Frontal lobe", "planum polare": "Superior temporal gyrus",
    "planum temporale": "Superior temporal gyrus",
}  # fmt: skip

ALL = sorted(EXPECTED)
SEGMENTING = [name for name in ALL if name in MANIFESTS and MANIFESTS[name].task is Task.SEGMENTATION]


def findings(manifest: Manifest) -> dict[int, Finding]:
    return {**manifest.segments, **manifest.classes}


def words(text: str) -> set[str]:
    """What the text says, without sides and small words."""
    text = re.sub(r"(?i)\bvena(?! cava)", "vein", text).replace("IFG", "inferior frontal gyrus")
    return set(re.findall(r"[a-z0-9]+", text.casefold())) - {"of", "the", "and", "in", "left", "right"}


def codes_in(manifest: Manifest) -> Iterator[Code]:
    for finding in findings(manifest).values():
        yield from (code for code in (finding.type, finding.category, finding.anatomic_region) if code is not None)
    yield manifest.algorithm_family


def test_there_are_25_and_nothing_of_the_bundles_beside_them():
    assert sorted(MANIFESTS) == ALL
    assert len(ALL) == 25
    assert {path.name for path in FOLDER.rglob("*") if path.is_file()} == {"dicom.yaml"}


@pytest.mark.parametrize("name", ALL)
def test_every_label_of_the_bundle_is_named_as_it_is_there(name: str):
    found = findings(MANIFESTS[name])

    assert sorted(found) == sorted(EXPECTED[name])
    for label, expected in EXPECTED[name].items():
        spoken = words(found[label].name)
        for word in words(expected):
            # "clavicula" is the clavicle, "2CH" the 2 chamber view: the beginning is enough
            assert any(said[:3] == word[:3] or word.startswith(said) for said in spoken), (
                label,
                expected,
                found[label],
            )


@pytest.mark.parametrize("name", [name for name in ALL if not name.endswith("_template")])
def test_the_code_of_a_finding_is_that_of_its_name(name: str):
    for finding in findings(MANIFESTS[name]).values():
        spoken = words(finding.name)
        unsaid = {word for word in words(finding.type.meaning) if not any(said[:3] == word[:3] for said in spoken)}
        bare = re.sub("^(Left|Right) ", "", finding.name)

        if unsaid - {"valve"}:
            assert IN_OTHER_WORDS.get(bare) == finding.type.meaning, finding
        else:
            assert bare not in IN_OTHER_WORDS, finding


@pytest.mark.parametrize("name", ALL)
def test_no_two_findings_of_a_bundle_bear_one_name(name: str):
    names = [finding.name for finding in findings(MANIFESTS[name]).values()]

    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ALL)
def test_sides_are_those_of_the_bundle(name: str):
    for label, finding in findings(MANIFESTS[name]).items():
        side = re.search(r"\b(left|right)\b", EXPECTED[name][label], re.IGNORECASE)
        said = re.search(r"\b(left|right)\b", finding.name, re.IGNORECASE)
        meant = re.search(r"\b(left|right)\b", finding.type.meaning, re.IGNORECASE)
        expected = side[1].casefold() if side else None

        if said:
            assert said[1].casefold() == expected or expected is None, (label, finding)
        if expected:  # by the code itself ("Left ventricle"), or by its laterality
            assert said, (label, finding)
            assert (meant[1].casefold() if meant else finding.laterality) == expected, (label, finding)
            assert finding.laterality in (expected, None), (label, finding)
        else:
            assert finding.laterality in (None, "both"), (label, finding)


@pytest.mark.parametrize("name", ALL)
def test_every_code_exists_and_means_what_it_says(name: str):
    for code in codes_in(MANIFESTS[name]):
        known = [
            entry.meaning.partition(" (")[0].casefold()
            for entry in getattr(codes, code.scheme).concepts.values()
            if entry.value == code.value
        ]
        elsewhere = {**SLICER, **UBERON}.get(code.value)

        assert code.scheme in ("SCT", "DCM", "NCIt"), code
        if known:
            assert code.meaning.casefold() in known, code
        else:
            assert code.scheme == "SCT", code
            assert code.meaning == elsewhere, code


def test_the_lists_of_codes_from_elsewhere_hold_no_more_than_is_used():
    used = {code.value for manifest in MANIFESTS.values() for code in codes_in(manifest)}
    known = {entry.value for entry in codes.SCT.concepts.values()}

    assert set(SLICER) | set(UBERON) <= used
    assert not (set(SLICER) | set(UBERON)) & known


@pytest.mark.parametrize("value", sorted({**SLICER, **UBERON}))
def test_codes_from_elsewhere_bear_a_right_check_digit(value: str):
    """SNOMED CT identifiers end in a Verhoeff check digit: no digit was lost or swapped on the way."""
    assert verhoeff(value) == 0


def verhoeff(digits: str) -> int:
    """0 where the last digit is right: multiplication in the dihedral group of the pentagon."""

    def times(a: int, b: int) -> int:
        if a < 5:
            return (a + b) % 5 if b < 5 else 5 + (a + b - 5) % 5
        return 5 + (a - 5 - b) % 5 if b < 5 else (a - b) % 5

    step = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
    check = 0
    for place, digit in enumerate(reversed(digits)):
        permuted = int(digit)
        for _ in range(place % 8):
            permuted = step[permuted]
        check = times(check, permuted)
    return check


@pytest.mark.parametrize("name", SEGMENTING)
def test_neighbours_can_be_told_apart_by_their_colour(name: str):
    segments = MANIFESTS[name].segments
    colours = [segments[label].color_cielab for label in sorted(segments)]

    assert None not in colours
    for first, second in pairwise(colours):
        assert math.dist(first or (), second or ()) >= 10
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize("name", ALL)
def test_it_says_what_it_is_for_and_under_which_terms(name: str):
    manifest = MANIFESTS[name]

    assert re.match(r"For (research|demonstration)", manifest.intended_use)
    assert manifest.licence_code.startswith(("Apache-2.0", "MIT", "Private Use"))
    assert manifest.licence_weights.endswith((".", "syn3193805)"))


@pytest.mark.parametrize("name", ["multi_organ_segmentation", "vista3d", "renalStructures_CECT_segmentation"])
def test_weights_that_must_not_be_used_for_money_say_so(name: str):
    assert "non-commercial" in MANIFESTS[name].licence_weights.casefold()


@pytest.mark.parametrize("name", ALL)
def test_measurements_fit_the_kind_of_image(name: str):
    manifest = MANIFESTS[name]
    first = next(iter(manifest.inputs.values()))
    modality = first.when.get("Modality")

    if manifest.task is not Task.SEGMENTATION or first.kind == "image":
        assert manifest.measurements == ()
    elif modality == "CT":
        assert manifest.measurements == (Measurement.VOLUME, Measurement.MEAN, Measurement.STANDARD_DEVIATION)
    else:  # the values of MR have no unit: their mean tells nothing
        assert manifest.measurements == (Measurement.VOLUME,)


def test_vista3d_is_asked_for_what_its_segments_mean():
    manifest = MANIFESTS["vista3d"]

    assert manifest.item["label_prompt"] == sorted(manifest.segments)
    assert set(manifest.segments) == set(VISTA3D) - VISTA3D_NOT_ASKED
    assert manifest.background == (255,)


def test_models_of_several_series_tell_them_apart():
    for name, first in (("brats_mri_segmentation", "t1c"), ("renalStructures_CECT_segmentation", "artery")):
        inputs = MANIFESTS[name].inputs
        assert [key for key, wanted in inputs.items() if not wanted.onto_first] == [first]
        assert len({tuple(wanted.when.items()) for wanted in inputs.values()}) == len(inputs)
    assert MANIFESTS["brats_mri_segmentation"].data == {"image": ("t1c", "t1", "t2", "flair")}


def test_bundles_that_do_not_turn_their_image_get_it_turned():
    brats = MANIFESTS["brats_mri_segmentation"].inputs.values()
    brain = MANIFESTS["wholeBrainSeg_Large_UNEST_segmentation"].inputs["image"]

    assert {(wanted.orientation, wanted.spacing_mm) for wanted in brats} == {("LPS", (1.0, 1.0, 1.0))}
    assert brain.orientation == "RAS"
    assert MANIFESTS["ventricular_short_axis_3label"].inputs["image"].orientation is None


CECT, BRATS, PROSTATE = "renalStructures_CECT_segmentation", "brats_mri_segmentation", "prostate_mri_anatomy"


@pytest.mark.parametrize(
    ("name", "description", "agent", "expected"),
    [
        (CECT, "Late arterial 1.0", "Iohexol", "artery"), (CECT, "Corticomedullary", "Iohexol", "artery"),
        (CECT, "Portal venous 3mm", "Iohexol", "vein"), (CECT, "Nephrographic", "Iohexol", "vein"),
        (CECT, "Delayed 5 min", "Iohexol", "excret"), (CECT, "Excretory phase", "Iohexol", "excret"),
        (CECT, "Abdomen native", "", None), (BRATS, "t1_mprage_sag_iso", "", "t1"),
        (BRATS, "t1_mprage_sag_iso_KM", "Gadobutrol", "t1c"), (BRATS, "t2_tse_tra", "", "t2"),
        (BRATS, "AX T2 FLAIR", "", "flair"), (BRATS, "t2_tirm_tra_dark-fluid", "", "flair"),
        (BRATS, "T2*_GRE", "", None), (BRATS, "ep2d_diff", "", None), (PROSTATE, "t2_tse_tra", "", "image"),
        (PROSTATE, "t2_tse_cor", "", None), ("ventricular_short_axis_3label", "cine SA stack", "", "image"),
        ("ventricular_short_axis_3label", "sag t2", "", None),
    ],
)  # fmt: skip
def test_a_series_is_at_most_one_input_and_the_right_one(name: str, description: str, agent: str, expected: str | None):
    series = Dataset()
    series.Modality = "CT" if name == CECT else "MR"
    series.SeriesDescription, series.ContrastBolusAgent = description, agent

    fitting = [key for key, wanted in MANIFESTS[name].inputs.items() if wanted.when.matches(series)]

    assert fitting == ([expected] if expected else [])
