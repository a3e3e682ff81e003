"""The source distribution and the wheel: they have all that belongs to them, need no other file, and versions agree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import capt_peft
from capt_peft import load_task

ROOT = Path(__file__).parent.parent
MADE = {".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split())}
BUILD = "from setuptools import build_meta; build_meta.build_{}('dist')"
PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
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


@pytest.fixture(scope="module")
def wheel(sdist):
    """The wheel, made of the source distribution alone."""
    subprocess.run([sys.executable, "-c", BUILD.format("wheel")], cwd=sdist[1], check=True, capture_output=True)
    (path,) = (sdist[1] / "dist").glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package_and_is_small(sdist, wheel):
    """Models, digits and configurations too."""
    files, path = sdist[0], wheel
    with zipfile.ZipFile(path) as content:
        names = set(content.namelist())
        assert content.read("capt_peft/toy/digits.parquet") == (ROOT / "capt_peft/toy/digits.parquet").read_bytes()
    package = {str(file) for file in files if file.parts[0] == "capt_peft"}
    assert {"capt_peft/toy/tiny_clip/model.safetensors", "capt_peft/commands/configs/parts.yaml"} < package
    assert package - names == set() and path.stat().st_size <= MAX_WHEEL


def first_screen():
    """The commands that README shows before its results, as lists of words."""
    (text, _) = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Results\n")
    lines = re.sub(r"\\\n +", "", text).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("capt-peft ")]


def run_first_screen(python, folder, quick):
    """Runs them where the wheel is installed, in an empty folder, with a small CLIP and a few images for a large one and many."""
    digits = load_task("digits")["train"]
    for i in range(60):
        path = folder / "path" / "to" / "images" / str(digits[i]["label"]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        digits[i]["image"].save(path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    told = {}
    for script, name, *words in first_screen():
        words = [{"openai/clip-vit-base-patch32": "tiny_clip"}.get(word, word) for word in words]
        done = subprocess.run(
            [python.with_name(script), name, *words, *quick.get(name, [])],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        told[name] = done.stdout
        offline = name == "push"  # tests/commands/test_push.py pushes to a Hub
        assert done.returncode == (2 if offline else 0), (name, done.stdout, done.stderr)
        assert not offline or done.stderr == "capt-peft push: Nothing can be uploaded while HF_HUB_OFFLINE is set.\n"
    assert list(told) == ["demo", "train", "evaluate", "push"]
    assert "the same 10 x 10 logits, bit for bit" in told["demo"] and (folder / "outputs/demo/attack.png").is_file()
    assert "| CAPT |" in told["train"]
    assert "| robust | L-inf 1/255 | " in told["evaluate"]  # the epsilon of the tuning
    place = subprocess.check_output([python, "-c", "import capt_peft; print(capt_peft.__file__)"], cwd=folder, text=True,
                                    env=environment)  # fmt: skip
    assert Path(place.strip()).is_relative_to(python.parents[1])


def test_the_first_screen_of_readme_runs_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    """In a fresh environment, which takes the other packages from this one: only the wheel is installed into it."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    # elsewhere: pip counts what the current folder has as installed, and a checkout has its own metadata
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    packages = Path(subprocess.check_output([python, "-c", PURELIB], text=True).strip())
    # paths of a .pth file are not searched for further ones: an editable install of this package stays out of it
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "empty").mkdir()
    short = ["--max_steps", "1", "--shots", "1", "--eval_limit", "4", "--eval_attack", "pgd-1", "--use_cpu"]
    evaluate = ["--limit", "4", "--signs", "false", "--use_cpu", "--attacks", "clean,apgd-ce"]
    run_first_screen(python, tmp_path / "empty", {"demo": short, "train": short, "evaluate": evaluate})


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_first_screen_of_readme_runs_as_it_stands_from_what_pip_installs(wheel, tmp_path):
    """Everything from the package index, pinned as in this repository, and the whole demo; the user's images are few."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(pip, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    (tmp_path / "empty").mkdir()
    run_first_screen(python, tmp_path / "empty", {"train": ["--num_train_epochs", "2"], "evaluate": ["--limit", "4"]})


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
