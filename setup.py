from pathlib import Path

from setuptools import find_packages, setup


setup(
    name="pixelrepa-diffusers",
    version="0.1.0",
    description="PixelREPA and JiT (pixel-space diffusion transformers) for the Hugging Face ecosystem",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"pixelrepa_diffusers": ["*.json", "*.md", "py.typed"]},
    entry_points={
        "console_scripts": [
            "pixelrepa-generate=pixelrepa_diffusers.commands.generate:cli",
            "pixelrepa-app=pixelrepa_diffusers.commands.app:cli",
            "pixelrepa-evaluate=pixelrepa_diffusers.commands.evaluate:cli",
            "pixelrepa-convert=pixelrepa_diffusers.commands.convert_checkpoint:cli",
            "pixelrepa-publish=pixelrepa_diffusers.commands.publish:cli",
            "pixelrepa-prepare-reference=pixelrepa_diffusers.commands.prepare_reference:cli",
            "pixelrepa-prepare-dataset=pixelrepa_diffusers.commands.prepare_dataset:cli",
            "pixelrepa-probe-alignment=pixelrepa_diffusers.commands.probe_alignment:cli",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.13",
        "datasets>=4.0",
        "diffusers>=0.41",
        "filelock>=4.0",
        "transformers>=5.20",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "huggingface-hub>=1.32",
        "numpy>=2.0",
        "Pillow>=10.1",
    ],
    extras_require={
        "train": [
            "evaluate>=0.4.6",
            "matplotlib>=3.9",
            "peft>=0.18",
            "pyyaml>=6.0",
            "scikit-learn>=1.5",
            "scipy>=1.13",
            "tensorboard>=2.18",
        ],
        # The Inception network of FID and IS. It brings torchvision, which must match the installed torch build.
        "eval": ["evaluate>=0.4.6", "matplotlib>=3.9", "scipy>=1.13", "torch-fidelity>=0.4.0"],
        "quantization": ["torchao>=0.18"],
        "app": ["gradio>=6.0"],  # pixelrepa-app
        "dev": ["peft>=0.18", "psutil>=5.9", "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.14"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
