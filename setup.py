"""The packages of the distribution `warmstate`; pyproject.toml has everything else of it."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
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
)
