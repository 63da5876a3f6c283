"""Captions of synthetic tiles: several wordings a tile, none of which says more than was drawn."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from quiltnet.data.synthetic_tissue import Attributes

# The first name is the class's: what a zero-shot prompt is filled with.
NAMES = {
    "adipose": ("adipose tissue", "mature fat", "a lobule of adipocytes"),
    "glands": ("glandular epithelium", "tubular glands", "glandular mucosa"),
    "smooth_muscle": ("smooth muscle", "smooth muscle bundles", "muscularis"),
    "lymphocytes": ("lymphoid tissue", "a sheet of lymphocytes", "a lymphoid aggregate"),
    "fibrous_stroma": ("fibrous stroma", "collagenous connective tissue", "fibrous tissue"),
    "mucin": ("mucin pools", "extracellular mucin", "mucinous material"),
    "necrosis": ("necrosis", "necrotic debris", "coagulative necrosis"),
    "squamous": ("squamous epithelium", "stratified squamous epithelium", "keratinizing squamous mucosa"),
    "tumor": ("solid tumor nests", "a solid carcinoma", "cohesive nests of tumor cells"),
    "cartilage": ("hyaline cartilage", "cartilaginous tissue", "mature cartilage"),
}
CLASS_NAMES = {pattern: names[0] for pattern, names in NAMES.items()}

# What the drawing of a pattern shows whatever its attributes.
FINDINGS = {
    "adipose": (
        "empty vacuoles with thin membranes",
        "round clear cells whose flattened nuclei lie at the rim",
        "optically empty cells in a delicate network",
    ),
    "glands": (
        "rings of epithelial nuclei around open lumina",
        "round glands lined by columnar cells in a pink stroma",
        "basal nuclei around a central lumen",
    ),
    "smooth_muscle": (
        "parallel eosinophilic fascicles",
        "elongated cigar-shaped nuclei along the fibres",
        "wavy pink bundles running in one direction",
    ),
    "lymphocytes": (
        "dark round nuclei with scant cytoplasm",
        "closely related round cells in a diffuse sheet",
        "sheets of blue cells without architecture",
    ),
    "fibrous_stroma": (
        "wavy collagen fibres separated by clefts",
        "thin spindle nuclei between collagen bundles",
        "interlacing pink fibres",
    ),
    "mucin": (
        "blue-grey pools with fine strands",
        "cell clusters floating in mucin",
        "amorphous bluish material divided by thin septa",
    ),
    "necrosis": (
        "ghost outlines of cells and nuclear dust",
        "smudged eosinophilic debris with karyorrhexis",
        "granular pink material without viable architecture",
    ),
    "squamous": (
        "maturation from a dark basal layer to surface keratin",
        "layered polygonal cells beneath keratin",
        "flattening of the cells towards a keratinized surface",
    ),
    "tumor": (
        "polygonal cells with vesicular nuclei and nucleoli",
        "cohesive sheets of atypical cells divided by thin septa",
        "pleomorphic nuclei in solid growth without lumina",
    ),
    "cartilage": (
        "chondrocytes in lacunae",
        "a glassy basophilic matrix with lacunae",
        "paired cells within clear spaces of a bluish matrix",
    ),
}

# Lymphocytes do not stand out among lymphocytes: in lymphoid tissue an infiltrate shows by its eosinophils.
LYMPHOID_INFLAMMATION = {
    "absent": ("no eosinophils",),
    "present": ("scattered eosinophils", "admixed eosinophils"),
}

# No phrase of one value occurs in a phrase of another or in a finding: what a caption says can be checked.
PHRASES = {
    "cellularity": {
        "low": ("low cellularity", "widely spaced nuclei", "sparse nuclei"),
        "high": ("high cellularity", "crowded nuclei", "numerous nuclei"),
    },
    "nuclear_size": {
        "small": ("small nuclei", "nuclei of small size"),
        "large": ("large nuclei", "enlarged nuclei"),
    },
    "stain": {
        "pale": ("pale staining", "a weak H&E stain"),
        "strong": ("strong staining", "an intense H&E stain"),
    },
    "inflammation": {
        "absent": ("no inflammation", "no inflammatory infiltrate"),
        "present": ("scattered inflammatory cells", "an infiltrate of lymphocytes and eosinophils"),
    },
}

TEMPLATES = (
    "{name} with {first} and {second}",
    "{name}: {finding}; {first}",
    "H&E section of {name}, showing {finding}, with {first}",
    "{finding}, consistent with {name}; {first} and {second}",
    "Histopathology of {name} with {first}",
    "{first}, {second}, and {finding}: {name}",
    "Microscopic view: {name}, {finding}",
)


def phrases_for(pattern: str, attributes: Attributes) -> list[tuple[str, ...]]:
    """The wordings that are true of a tile, a tuple an attribute."""
    phrases = {attribute: PHRASES[attribute][value] for attribute, value in asdict(attributes).items()}
    if pattern == "lymphocytes":
        phrases["inflammation"] = LYMPHOID_INFLAMMATION[attributes.inflammation]
    return list(phrases.values())


def write_captions(pattern: str, attributes: Attributes, rng: np.random.Generator) -> list[str]:
    """Three to five distinct sentences; each names the pattern, most name one or two attributes."""
    phrases = phrases_for(pattern, attributes)
    captions = []
    for template in rng.permutation(TEMPLATES)[: rng.integers(3, 6)]:
        one, other = rng.permutation(len(phrases))[:2]
        caption = template.format(
            name=rng.choice(NAMES[pattern]),
            finding=rng.choice(FINDINGS[pattern]),
            first=rng.choice(phrases[one]),
            second=rng.choice(phrases[other]),
        )
        captions.append(f"{caption[0].upper()}{caption[1:]}.")
    return captions
