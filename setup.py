"""Packaging of s3prl_ekd: four top-level folders, one import name.

``upstream``, ``pretrain_configs`` and ``downstream_recipes`` stand beside the package, where
s3prl's users look for them, and are installed as ``s3prl_ekd.upstream`` and so on: a top-level
package called ``upstream`` would shadow s3prl's own.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (HERE / "s3prl_ekd" / "__init__.py").read_text(encoding="utf-8")
).group(1)

FOLDERS = {
    "s3prl_ekd": "s3prl_ekd",
    "s3prl_ekd.upstream": "upstream",
    "s3prl_ekd.pretrain_configs": "pretrain_configs",
    "s3prl_ekd.downstream_recipes": "downstream_recipes",
}


def public_address():
    """The project's address, from CITATION.cff; None while there is none."""
    text = (HERE / "CITATION.cff").read_text(encoding="utf-8")
    match = re.search(r"^repository-code: *[\"']?([^\s\"']+)", text, re.MULTILINE)
    return match[1].rstrip("/") if match else None


def project_urls(address):
    if address is None:
        return {}
    pages = {"Source": "", "Documentation": "/tree/HEAD/docs", "Issues": "/issues"}
    pages["Changelog"] = "/blob/HEAD/CHANGELOG.md"
    return {name: address + path for name, path in pages.items()}


def long_description(address):
    """README.md for PyPI, where relative links do not work.

    With an address they become absolute, without one plain text; code blocks are unchanged.
    """

    def replace(match):
        image, text, target = match.groups()
        if target.startswith(("https://", "http://", "#")):
            return match[0]
        if address is None:
            return text
        return f"{image}[{text}]({address}/{'raw' if image else 'blob'}/HEAD/{target})"

    text = (HERE / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(!?)\[([^\]]*)\]\(([^)]*)\)", replace, parts[i])
    return "".join(parts)


def packages():
    """Every folder with an ``__init__.py`` below the four, under its import name."""
    names = []
    for name, folder in FOLDERS.items():
        for init in sorted((HERE / folder).rglob("__init__.py")):
            below = init.parent.relative_to(HERE / folder).parts
            names.append(".".join((name, *below)))
    return names


DEMO = ["espeakng-loader>=0.2.4"]
PLOTS = ["matplotlib>=3.7"]
ANALYSIS = ["scipy>=1.9", *PLOTS]
UNITS = ["scikit-learn>=1.3"]
ONNX = ["onnx>=1.17", "onnxruntime>=1.20"]
G2P = ["espnet-g2p-en>=2.1.0.post1"]
ALIGN = ["pocketsphinx>=5.1"]
LHOTSE = ["lhotse>=1.33,<2"]
# what s3prl's recipes for IC (pandas), ASV, SD and QbE import
SUPERB = ["pandas>=1.5", "h5py>=3.8", "dtw-python>=1.3", "lxml>=4.9", *UNITS]
LINT = ["ruff>=0.6", "mypy>=1.11", "types-PyYAML"]
DOCS = ["sphinx>=8", "myst-parser>=4", "furo>=2024.8.6"]
DEV = [
    "pytest>=8",
    "pytest-xdist>=3.8",
    "build>=1",
    "setuptools>=70.1",
    "jiwer>=3",
    "hypothesis>=6.100",
    *LINT,
]

ADDRESS = public_address()

setup(
    name="s3prl_ekd",
    version=VERSION,
    description="Distil several speech SSL teachers into one small student, inside s3prl",
    long_description=long_description(ADDRESS),
    long_description_content_type="text/markdown",
    author="The s3prl_ekd authors",
    keywords=[
        "speech",
        "self-supervised learning",
        "knowledge distillation",
        "s3prl",
        "SUPERB",
        "HuBERT",
        "WavLM",
    ],
    project_urls=project_urls(ADDRESS),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages(),
    package_dir=FOLDERS,
    package_data={
        "": ["*.yaml", "*.txt", "*.dict", "*.tsv", "*.json"],
        "s3prl_ekd": ["py.typed"],
        "s3prl_ekd.teachers.zoo": ["files/*.pt", "cards/*.md"],
    },
    install_requires=[
        "s3prl>=0.4.18",
        "torch>=2.5",
        "torchaudio>=2.5",
        "numpy>=1.24",
        "pyyaml>=6",
        "safetensors>=0.4.5",
        "editdistance>=0.6",
        "tensorboardX>=2.6",
        "soundfile>=0.13",
        "pandas>=2",
        "tqdm>=4.66",
        "setuptools",
        "transformers>=4.48",
        "huggingface_hub>=0.24",
    ],
    extras_require={
        "demo": DEMO,
        "plots": PLOTS,
        "analysis": ANALYSIS,
        "units": UNITS,
        "onnx": ONNX,
        "g2p": G2P,
        "align": ALIGN,
        "lhotse": LHOTSE,
        "superb": SUPERB,
        "probe": UNITS + PLOTS,
        "docs": DOCS,
        "dev": DEV + DOCS + DEMO + ANALYSIS + ONNX + G2P + ALIGN + LHOTSE + SUPERB,
    },
    entry_points={
        "console_scripts": [
            "s3prl-ekd=s3prl_ekd.cli:main",
            "run_pretrain.py=s3prl_ekd.launch:run_pretrain",
            "run_downstream.py=s3prl_ekd.launch:run_downstream",
        ]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
