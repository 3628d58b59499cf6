"""Installs `recyclable`, its command, and the launch scripts and DeepSpeed configs that live at the top."""

from setuptools import find_packages, setup

# Directories at the top of the repository that travel inside the package; recyclable/resources.py finds them.
SHIPPED = {"recyclable.launch": "launch", "recyclable.ds_configs": "ds_configs"}

# Tried: 3.7.1 and 3.9.0. A CUDA build of torch brings its own; the tests run the kernels in Triton's interpreter.
TRITON = "triton>=3.7,<3.10; sys_platform == 'linux'"

setup(
    name="recyclable",
    version="0.1.0",
    description="Upgrade a base model by continual pre-training and bring everything tuned on the old one along",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["recyclable", "recyclable.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={name: ["*"] for name in SHIPPED},
    install_requires=[
        # Bounded above: the newest torch may come as a GPU build of several GB even where there is no GPU.
        # Bounded below: torch.load before 2.10 has CVE-2026-24747.
        "torch>=2.10,<2.14",
        "deepspeed>=0.19.8,<0.20",  # recyclable/training/ leans on its internals: one minor version at a time
        "transformers>=5.17,<5.24",  # with 5.24 peft 0.21 makes no prefix-tuning model of a BERT any more
        "datasets>=4,<6",
        "peft>=0.19,<1",
        "accelerate>=1.10,<2",  # peft's own need
        "huggingface_hub>=1,<3",
        "safetensors>=0.6,<1",
        "blake3>=1,<2",
        "sentencepiece>=0.2,<1",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
        "numpy>=1.26,<3",
        "pandas>=2.2,<4",
        "scipy>=1.13,<2",
        "nervaluate>=1.2,<2",
        "torchmetrics>=1.9,<2",
        "tqdm>=4.66,<5",
        "psutil>=5.9,<8",
        "pyyaml>=6,<7",
        "pydantic>=2.9,<3",
        "typing_extensions>=4.12,<5",  # pydantic wants its TypedDict before Python 3.12
    ],
    extras_require={
        "triton": [TRITON],
        "test": [
            TRITON,
            "pytest>=8,<10",
            "hypothesis>=6.100,<7",
            "ruff>=0.9,<1",
            "mypy>=1.15,<3",
            "setuptools>=70.1",
            "gguf>=0.19,<0.20",  # benchmarks/real_decoders.py reads such files
            # SentencePiece models, two of a line; from 1.10 on it holds numpy back
            "mistral-common>=1.8.5,<1.10",
            "lm-eval>=0.4.13,<0.5",  # what leaves is scored by it, beside our own scores
        ],
    },
    entry_points={"console_scripts": ["recyclable=recyclable.cli:main"]},
)
