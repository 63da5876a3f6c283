"""Every file of the prompts group builds, and says something of every class of QuiltNet's zero-shot sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from quiltnet.evaluation.prompts import PromptSet

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "prompts").glob("*.yaml"))

# As in eval/en_classnames.json of github.com/wisdomikezogwo/quilt1m, in its order.
SKIN_TUMORS = ["squamous-cell carcinoma", "melanoma in-situ", "basal-cell carcinoma", "naevus"]
CLASS_NAMES = {
    "pcam": ["lymph node", "lymph node containing metastatic tumor tissue"],
    "nck": [
        "adipose",
        "debris",
        "lymphocytes",
        "mucus",
        "smooth muscle",
        "normal colon mucosa",
        "cancer-associated stroma",
        "colorectal adenocarcinoma epithelium",
    ],
    "lc25000_lung": ["lung adenocarcinoma", "benign lung", "lung squamous cell carcinoma"],
    "lc25000_colon": ["colon adenocarcinoma", "benign colonic tissue"],
    "mhist": ["hyperplastic polyp", "sessile serrated adenoma"],
    "sicap": [
        "benign glands",
        "atrophic dense glands",
        "cribriform ill-formed fused papillary patterns",
        "isolated nest cells without lumen roseting patterns",
    ],
    "idc_grade": [
        "well differentiated bloom richardson grade one",
        "moderately differentiated bloom richardson grade two",
        "poorly differentiated grade three",
    ],
    "osteo": ["non-tumor", "non-viable necrotic osteosarcoma tumor", "viable osteosarcoma tumor"],
    "bach": [
        "breast non-malignant benign tissue",
        "breast malignant in-situ carcinoma",
        "breast malignant invasive carcinoma",
        "breast normal breast tissue",
    ],
    "renal_cell": [
        "red blood cells",
        "renal cancer",
        "normal renal tissue",
        "torn adipose necrotic tissue",
        "muscle fibrous stroma blood vessels",
    ],
    "skin": [
        "necrosis",
        "skeletal muscle",
        "eccrine sweat glands",
        "vessels",
        "elastosis",
        "chondral tissue",
        "hair follicle",
        "epidermis",
        "nerves",
        "subcutis",
        "dermis",
        "sebaceous glands",
        *SKIN_TUMORS,
    ],
    "skin_tumor": SKIN_TUMORS,
}
# Sets that are also measured together or with a class more.
CLASS_NAMES["nck with background"] = [*CLASS_NAMES["nck"], "background"]
CLASS_NAMES["lc25000"] = [
    *["benign lung tissue", "lung adenocarcinoma", "lung squamous cell carcinoma"],
    *CLASS_NAMES["lc25000_colon"],
]


def prompt_set(folder: Path, name: str, *searchpath: Path) -> PromptSet:
    """As ``prompts@evaluator.zeroshot_lc25000.prompts=NAME`` on the command line builds it."""
    paths = ", ".join(f"'file://{path}'" for path in (*searchpath, CONF))
    (folder / "main.yaml").write_text(
        f"defaults: [evaluator: [zeroshot_lc25000], _self_]\nhydra: {{searchpath: [{paths}]}}\ndata_root: absent\n"
    )
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = compose("main", overrides=[f"prompts@evaluator.zeroshot_lc25000.prompts={name}"])
    return instantiate(cfg.evaluator.zeroshot_lc25000.prompts, _convert_="all")


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_a_prompt_set_of_its_own_name_for_all_classes(tmp_path, name):
    prompts = prompt_set(tmp_path, name)
    assert prompts.name == name
    for class_names in CLASS_NAMES.values():
        filled = prompts.fill(class_names)
        assert list(filled) == class_names
        assert all("{" not in prompt for of_class in filled.values() for prompt in of_class)


@pytest.mark.parametrize("name", NAMES)
def test_each_file_says_its_source(name):
    assert (CONF / "prompts" / f"{name}.yaml").read_text().startswith("# ")


def test_ensemble_has_synonyms_of_every_class(tmp_path):
    prompts = prompt_set(tmp_path, "ensemble")
    assert len(prompts.templates) >= 22
    for class_names in CLASS_NAMES.values():
        assert prompts.describe(class_names)["without_synonyms"] == []
        assert all(3 <= len(prompts.synonyms[name]) <= 6 for name in class_names)
    assert set(prompts.synonyms) == {name for class_names in CLASS_NAMES.values() for name in class_names}


def test_quilt4_is_the_published_set_without_full_stop(tmp_path):
    assert prompt_set(tmp_path, "quilt4").fill(["mucus"])["mucus"] == [
        "a histopathology slide showing mucus",
        "histopathology image of mucus",
        "pathology tissue showing mucus",
        "presence of mucus tissue on image",
    ]


def test_quilt4_period_ends_the_same_prompts_with_a_full_stop(tmp_path):
    without = prompt_set(tmp_path, "quilt4").fill(["mucus"])["mucus"]
    assert prompt_set(tmp_path, "quilt4_period").fill(["mucus"])["mucus"] == [f"{prompt}." for prompt in without]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("plip", "An H&E image of mucus"), ("plip_patch", "An H&E image patch of mucus."), ("class_name", "mucus")],
)
def test_single_prompts(tmp_path, name, prompt):
    assert prompt_set(tmp_path, name).fill(["mucus"]) == {"mucus": [prompt]}


def test_a_users_own_file_may_build_on_ours(tmp_path):
    folder = tmp_path / "own" / "prompts"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "defaults: [quilt4, _self_]\nname: mine\ntemplates: ['{} of my laboratory']\nsynonyms: {mucus: [slime]}\n"
    )
    assert prompt_set(tmp_path, "mine", tmp_path / "own").fill(["mucus"]) == {"mucus": ["slime of my laboratory"]}
