from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="detbackbones",
    version="0.1.0",
    description="Any timm or torchvision model as a detectron2 backbone",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # The project has no public address yet: when it has one, give it here as url=.
    project_urls={
        "detectron2": "https://github.com/facebookresearch/detectron2",
        "timm": "https://github.com/huggingface/pytorch-image-models",
        "torchvision": "https://github.com/pytorch/vision",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="object detection, segmentation, backbone, detectron2, timm, torchvision",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    entry_points={"console_scripts": ["detbackbones = detbackbones.cli.main:main"]},
    # The LazyConfigs lie in configs/ at the top of the tree and inside the package in a wheel.
    packages=[*find_packages(include=["detbackbones", "detbackbones.*"]), "detbackbones.configs"],
    package_dir={"detbackbones.configs": "configs"},
    package_data={
        "detbackbones.catalog": ["catalog.json", "page.html"],
        "detbackbones.configs": ["**/*.py"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.31",  # of which every architecture has forward_intermediates
        "numpy",
        "pillow",
        "hotcoco>=1.3",
        "safetensors",
        "shapely",  # by which detectron2 crops polygons
        "tifffile",
        # Below: what detectron2 needs, which `detbackbones install-detectron2` itself installs.
        "cloudpickle",
        "fvcore>=0.1.5,<0.1.6",
        "hydra-core>=1.1",
        "iopath>=0.1.7",
        "matplotlib",
        "omegaconf>=2.1,<2.4",
        "opencv-python-headless",
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
        "lora": ["peft"],
        "predict": ["supervision>=0.31"],
        "export": ["nncf", "onnx", "onnxruntime", "onnxscript", "openvino"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "track": ["mlflow-skinny", "wandb"],
        "test": ["playwright", "pytest", "pytest-xdist", "ruff", "scikit-image"],
    },
)
