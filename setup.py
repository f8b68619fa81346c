from setuptools import find_packages, setup

setup(
    name="detbackbones",
    version="0.1.0",
    description="Any timm or torchvision model as a detectron2 backbone",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The LazyConfigs lie in configs/ at the top of the tree and inside the package in a wheel.
    packages=[*find_packages(include=["detbackbones", "detbackbones.*"]), "detbackbones.configs"],
    package_dir={"detbackbones.configs": "configs"},
    package_data={
        "detbackbones": ["catalog.json"],
        "detbackbones.configs": ["**/*.py", "**/*.md"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.15",
        "numpy",
        "pillow",
        "safetensors",
        # Below: what detectron2 needs; tools/install_detectron2.py installs detectron2 itself.
        "cloudpickle",
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7",
        "matplotlib",
        "omegaconf>=2.1,<2.4",
        "packaging",
        "pycocotools>=2.0.2",
        "setuptools<81",  # detectron2 imports pkg_resources, which later versions drop
        "tabulate",
        "tensorboard",
        "termcolor>=1.1",
        "tqdm>4.29.0",
        "yacs>=0.1.8",
    ],
    extras_require={
        "detr": ["scipy", "transformers>=5.23"],
        "test": ["playwright", "pytest", "ruff"],
    },
)
