"""`import capt_peft`: light, lazy, and whatever is imported in whichever order is wired together."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import capt_peft

HEAVY = "{'torch', 'transformers', 'peft', 'datasets', 'numpy'} & sys.modules.keys()"


def run(code):
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_is_imported_without_its_packages():
    assert run(f"import capt_peft, capt_peft.commands, capt_peft.toy; print({HEAVY})") == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import capt_peft\nimport peft",
        "import peft\nimport capt_peft",
        "import capt_peft.results.hub\nimport peft",
        "import importlib.util, capt_peft\nimportlib.util.find_spec('peft')\nfrom peft import PeftModel\nimport peft",
    ],
)
def test_capt_is_registered_with_peft_and_saves_cards(imports):
    code = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from capt_peft.tuner import config
print(PEFT_TYPE_TO_CONFIG_MAPPING["CAPT"].__name__, config.write_saved_card is not None)
"""
    assert run(f"{imports}\n{code}") == "CaptConfig True"


def test_the_tasks_without_a_download_are_known():
    assert run("from capt_peft.data.loading import load_task\nprint(load_task('digits').num_classes)") == "10"


def test_every_module_can_be_the_first_that_is_imported():
    """Each in a process of its own, which has the heavy packages already; PEFT begins again there."""
    root = Path(capt_peft.__file__).parent
    names = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in sorted(root.rglob("*.py"))]
    names = [name.removesuffix(".__init__") for name in names if ".app" not in name and not name.endswith("__main__")]
    code = f"""
import os, accelerate, datasets, pandas, peft, pyarrow.parquet, torch, transformers
from transformers import Trainer
del sys.modules["peft"]
for name in {names}:
    child = os.fork()
    if not child:
        try:
            __import__(name)
            assert sys.modules["peft"].PEFT_TYPE_TO_CONFIG_MAPPING["CAPT"] if "peft" in sys.modules else True
        except BaseException as error:
            print(name, repr(error), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    assert run(code) == ""


def test_every_public_name_is_there_and_listed_once_in_each_place():
    assert sorted(capt_peft._ROOM_OF) == sorted(capt_peft.__all__)
    assert sum(map(len, capt_peft._ROOMS.values())) == len(capt_peft.__all__)
    for name, room in capt_peft._ROOM_OF.items():
        assert getattr(capt_peft, name) is not None and name in dir(capt_peft), room
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        capt_peft.nothing  # noqa: B018
    assert capt_peft.training.__name__ == "capt_peft.training"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(capt_peft.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == capt_peft._ROOM_OF
