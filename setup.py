"""What is installed: the folders of the repository as packages of telechat_twins (telechat_twins/__init__.py says why).

configs/ travels as data, where core.files.ROOT leads to it. Tests stay in the repository.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("core", "convert", "kernels", "telechat_ms", "pt_reference", "configs")
found = find_namespace_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])
setup(
    packages=["telechat_twins", *(f"telechat_twins.{name}" for name in found)],
    package_dir={f"telechat_twins.{name}": name.replace(".", "/") for name in found},
)
