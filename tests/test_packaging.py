"""The source distribution and the wheel: they have all that belongs to them, need no other file, and versions agree."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import capt_peft

ROOT = Path(__file__).parent.parent
MADE = {".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split())}
BUILD = "from setuptools import build_meta; build_meta.build_{}('dist')"
MAX_WHEEL = 8_000_000  # bytes


def made(folder, names):
    return {name for name in names if any(fnmatch(name, pattern) for pattern in MADE)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The files that went in, and what came out, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=made, symlinks=True)
    walked = os.walk(folder / "source", followlinks=True)
    files = {Path(root, name).relative_to(folder / "source") for root, _, names in walked for name in names}
    subprocess.run(
        [sys.executable, "-c", BUILD.format("sdist")], cwd=folder / "source", check=True, capture_output=True
    )
    (archive,) = (folder / "source" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "out", filter="data")
    (unpacked,) = (folder / "out").iterdir()
    return files, unpacked


def test_the_source_distribution_has_every_file_of_the_repository(sdist):
    files, unpacked = sdist
    assert Path("tests/test_packaging.py") in files
    assert sorted(str(file) for file in files if not (unpacked / file).is_file()) == []


def test_the_wheel_has_every_file_of_the_package_and_is_small(sdist):
    """Models, digits and configurations too; it is made of the source distribution alone."""
    files, unpacked = sdist
    subprocess.run([sys.executable, "-c", BUILD.format("wheel")], cwd=unpacked, check=True, capture_output=True)
    (path,) = (unpacked / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("capt_peft/toy/digits.parquet") == (ROOT / "capt_peft/toy/digits.parquet").read_bytes()
    package = {str(file) for file in files if file.parts[0] == "capt_peft"}
    assert {"capt_peft/toy/tiny_clip/model.safetensors", "capt_peft/commands/configs/ablations/depth.yaml"} < package
    assert package - names == set() and path.stat().st_size <= MAX_WHEEL


def test_the_description_on_an_index_leads_to_no_file(sdist):
    _, description = (sdist[1] / "PKG-INFO").read_text(encoding="utf-8").split("\n\n", 1)
    tokens = [child for token in MarkdownIt().parse(description) for child in [token, *(token.children or [])]]
    assert [token for token in tokens if token.type == "image"] == []
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert links and [link for link in links if not re.match("https?://", link)] == []
    for words in (
        "# capt-peft",
        "`docs/evaluate.md`",
        "training on your data (`docs/train.md`)",
        "(`docs/attack.png`)",
    ):
        assert words in description


def test_the_version_is_the_same_in_every_file(sdist):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["version"] == capt_peft.__version__
    assert f"\nVersion: {capt_peft.__version__}\n" in (sdist[1] / "PKG-INFO").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^## \[{capt_peft.__version__}\] - {citation['date-released']}$", changes)
