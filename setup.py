"""Installation of fairseq-smoe: ``pip install .`` on Python 3.11 or 3.12."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fairseq_smoe/__init__.py").read_text())[1]

# wheels of ve-fairseq exist for this platform only
LINUX_X86_64 = 'sys_platform == "linux" and platform_machine == "x86_64"'
ELSEWHERE = 'sys_platform != "linux" or platform_machine != "x86_64"'

REQUIREMENTS = [
    # fairseq's own last release (0.12.2) fails to import on Python 3.11. ve-fairseq is the later
    # upstream code in binary wheels; pinned because it has a single release and no sources
    f"ve-fairseq==0.12.3; {LINUX_X86_64}",
    # the same code with the same repairs, as sources: needs a C++ compiler
    f"fairseq-fixed==0.12.3.1; {ELSEWHERE}",
    # 1.4 drops hydra.experimental, which fairseq imports
    "hydra-core>=1.3.2,<1.4",
    # 2.4 goes with hydra 1.4
    "omegaconf>=2.3,<2.4",
    # 2.11 is the oldest that torchaudio, which fairseq requires, does not pin to one version;
    # 2.14 and later are untested
    "torch>=2.11,<2.14",
    # older ones have no wheels for Python 3.12
    "numpy>=1.26",
    # groups and matches experts; scikit-learn, which fairseq requires, brings it as well
    "scipy",
    # 2.4 changed the BLEU class to the interface used here
    "sacrebleu>=2.4",
    # 0.2 brought wheels for Python 3.12
    "sentencepiece>=0.2",
    # --ddp-backend fully_sharded; the last release
    "fairscale==0.4.13",
    # weights of packed models
    "safetensors>=0.4",
    # progress bars of the data steps
    "tqdm",
]

EXTRAS = {
    "data": [
        "gdown>=6.5",  # files on Google Drive; older ones know neither retries nor timeouts
        "mtdata>=0.5.1,<0.6",  # --recipe; its index and cache are used, which may change
        "matplotlib",  # pictures of the report
    ],
    "plot": ["matplotlib"],
    "cluster": [
        "distributed>=2025.1",  # prepare --scheduler
        "dask-jobqueue>=0.9",  # --scheduler slurm
    ],
    "moefy": ["pymetis"],  # convert moefy --moefy-split graph
    "comet": ["unbabel-comet>=2.2"],  # brings numpy 1.26
    "serve": [
        "starlette>=0.40",
        "uvicorn>=0.30",
        "prometheus-client",
        "babel",  # names and codes of languages
    ],
    # export --format ctranslate2, and for comparison in scripts/bench_latency.py
    "ctranslate2": ["ctranslate2>=4.5"],
    # using what export --format transformers writes; the tests compare it with the library
    "transformers": ["transformers>=4.57"],
    "demo": [
        "polib",  # reads gettext catalogues
        "matplotlib",
    ],
    "test": [
        "matplotlib",
        "pytest",
        "pymetis",
        "pytest-timeout",  # a test that hangs is to fail
        "pytest-xdist",  # two test processes at a time
        "hypothesis",
        "import-linter",  # the contract about rooms
        "libretranslatepy",  # clients of the server
        "transpolibre",
        "playwright",  # drives a Chromium that is installed
        "tensorboard",
        "transformers>=4.57",  # read what export writes
        "ctranslate2>=4.5",
        "distributed>=2025.1",  # a cluster of two processes
        "dask-jobqueue>=0.9",
    ],
}

setup(
    name="fairseq-smoe",
    version=VERSION,
    description="Stratified mixture-of-experts translation for fairseq",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_smoe", "fairseq_smoe.*"]),
    package_data={"fairseq_smoe": ["benchmarks/*", "serving/page/*"]},
    python_requires=">=3.11,<3.13",  # fairseq has no wheels for later ones
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
