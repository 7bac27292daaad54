"""What is installed: the folders of the repository as packages of telechat_twins (telechat_twins/__init__.py says why).

configs/ travels as data, where core.files.ROOT leads to it, and so do the pages that are the demo's Chinese text. Tests
stay in the repository.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ("core", "convert", "kernels", "telechat_ms", "pt_reference", "configs")
PAGES = ("docs/tour.zh.md", "docs/maturity.zh.md", "docs/telechat2.zh.md")  # core/data/demo_text.py reads them


class BuildWithPages(build_py):
    """Setuptools' own, and PAGES, which lie above the package's folder, where package data cannot reach them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for page in PAGES:
                target = Path(self.build_lib) / "telechat_twins" / page
                self.mkpath(str(target.parent))
                self.copy_file(page, str(target))


found = find_namespace_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])
setup(
    packages=["telechat_twins", *(f"telechat_twins.{name}" for name in found)],
    package_dir={f"telechat_twins.{name}": name.replace(".", "/") for name in found},
    cmdclass={"build_py": BuildWithPages},
)
