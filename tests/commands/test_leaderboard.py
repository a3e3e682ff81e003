"""`capt-peft leaderboard`: from folders, lines and a Hub on loopback to a page; what is broken is listed and stops nothing."""

import json
import re
import shutil

import pytest
from commands.test_verify import TOKEN, measured  # noqa: F401
from hub_client import Client
from hub_server import Hub
from records import evaluation_record
from report.benchmark_lines import line, write

from capt_peft.commands.evaluate import main as evaluate
from capt_peft.commands.leaderboard import main


def told(capsys, *words):
    main(["--sources", *map(str, words)])
    return capsys.readouterr().out


def test_folders_and_lines_make_one_page(measured, tmp_path, capsys):  # noqa: F811
    lines = write(tmp_path / "lines.jsonl", [line("capt"), line("fap")])
    broken = shutil.copytree(measured, tmp_path / "runs" / "broken")
    shutil.copytree(measured, tmp_path / "runs" / "good")
    (broken / "adapter_model.safetensors").write_bytes((measured / "evaluation.safetensors").read_bytes())
    out = told(capsys, lines, tmp_path / "runs", "--output", tmp_path / "site")
    assert re.search(r"^Not shown: runs/broken: ", out, re.MULTILINE)
    assert f"3 rows on 2 boards: {tmp_path / 'site' / 'index.html'}" in out
    page = (tmp_path / "site" / "index.html").read_text()
    assert 'href="cards/runs_good.md"' in page and (tmp_path / "site" / "cards" / "runs_good.md").is_file()
    assert "capt, 1 shot" in page and "not checked" in page and "runs/broken" in page and str(tmp_path) not in page


def test_the_folder_that_one_stands_in_can_be_shown(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(evaluation_record("a" * 16, "b" * 16)))
    monkeypatch.chdir(folder)
    assert "1 row on 1 board" in told(capsys, ".", "--output", tmp_path / "site")
    assert "1 row on 1 board" in told(capsys, folder, tmp_path, "--output", tmp_path / "site")  # not shown twice
    assert '<th scope="row" data-value="mine">' in (tmp_path / "site" / "index.html").read_text()


def test_verified_is_what_this_run_has_checked(measured, tmp_path, capsys):  # noqa: F811
    good, forged = (shutil.copytree(measured, tmp_path / "runs" / name) for name in ("good", "forged"))
    record = json.loads((forged / "evaluation.json").read_text())
    record["images"]["sha256"] = "0" * 64
    record["configuration"]["seed"] = 1
    (forged / "evaluation.json").write_text(json.dumps(record))
    shutil.rmtree(forged / "evaluations")
    told(capsys, tmp_path / "runs", "--output", tmp_path / "site", "--verify")
    page = (tmp_path / "site" / "index.html").read_text()
    cells = re.findall(r'<td data-value="([^"]*)"><span', page)
    assert sorted(cell[:30] for cell in cells) == ["not verified: the hash of eval", "verified"]
    assert page.count("not ranked: its images, weights and figures do not agree") == 1
    assert good.is_dir()


def test_a_bare_clip_and_other_evaluations_of_an_adapter_are_verified(measured, tmp_path, capsys):  # noqa: F811
    good = shutil.copytree(measured, tmp_path / "runs" / "good")
    for name in ("evaluation.json", "evaluation.safetensors", "evaluation.parquet"):
        (good / name).unlink(missing_ok=True)
    (other,) = (good / "evaluations").glob("*.json")
    moved = tmp_path / "runs" / "moved"
    moved.mkdir()
    for path in (good / "evaluations").glob(f"{other.stem}.*"):
        shutil.copyfile(path, moved / path.name)
    base = json.loads(other.read_text())["configuration"]["model"]["base"]["name"]
    how = ["--attacks", "pgd-2", "--limit", "20", "--signs", "false", "--use_cpu", "--epsilon", "4/255"]
    bare = tmp_path / "runs" / "bare.json"
    evaluate(["--base", base, "--dataset_name", "digits", *how, "--save_images", "--output", str(bare)])
    told(capsys, tmp_path / "runs", "--output", tmp_path / "site", "--verify")
    cells = re.findall(r'<td data-value="([^"]*)"><span', (tmp_path / "site" / "index.html").read_text())
    assert sorted(cells) == ["not checked: the adapter that it is of is not beside it.", "verified", "verified"]


def test_evaluations_of_a_folder_that_contradict_each_other_are_all_left_out(measured, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(measured, tmp_path / "runs" / "one")
    shutil.copytree(measured, tmp_path / "runs" / "two")
    (other,) = (folder / "evaluations").glob("*.json")
    record = json.loads(other.read_text())
    record["signs"] = [{"name": "x", "raised": True, "value": 1.0, "threshold": 0.0, "sentence": "x"}]
    other.write_text(json.dumps(record))
    out = told(capsys, tmp_path / "runs", "--output", tmp_path / "site")
    same = "its figures are others than those of"
    assert f"Not shown: runs/one: {same} runs/one/evaluations/{other.name}, measured in the same way" in out
    assert f"Not shown: runs/one/evaluations/{other.name}: {same} runs/one," in out and "1 row on 1 board" in out


def test_without_sources_the_command_says_what_to_name():
    with pytest.raises(ValueError, match=r"^Name what is shown: capt-peft leaderboard SOURCES, which are folders"):
        main([])


def test_repositories_with_a_tag_are_shown_with_a_link_and_broken_ones_listed(measured, tmp_path):  # noqa: F811
    with Hub({TOKEN: "someone"}) as hub:
        run = Client(tmp_path / "log.txt", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"), HF_TOKEN=TOKEN)
        for name in ("good", "torn", "bare", "secret"):
            words = ["push", str(measured), f"someone/{name}"]
            run("command", *words, *(["--private"] if name == "secret" else []))
        files = dict(hub.repos["someone/torn"].files())
        hub.repos["someone/torn"].commit("main", {**files, "evaluation.json": files["evaluation.json"][:100]})
        without = {name: content for name, content in files.items() if not name.startswith("evaluation")}
        hub.repos["someone/bare"].commit("main", without)
        out = run("command", "leaderboard", "adversarial-robustness", "--output", str(tmp_path / "site"), "--verify")
        run.close()
        assert "Not shown: someone/bare: it has no evaluation.json" in out and "Not shown: someone/torn: " in out
        assert "1 row on 1 board:" in out and "secret" not in out
        page = (tmp_path / "site" / "index.html").read_text()
        assert f'href="{hub.endpoint}/someone/good"' in page and '<td data-value="verified">' in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl"], "There is no file or folder none.jsonl"),
        (["no/folder"], "There is no file or folder no/folder"),
        (["a-tag"], "There is no file or folder a-tag, and no tag is looked for while HF_HUB_OFFLINE is set"),
        (["FOLDER"], r"There is nothing to show\."),
        (["FOLDER", "--output", "FILE"], "is a file, but a folder is written"),
        (["FOLDER", "--output", "/proc/x"], "Nothing can be written into --output='/proc/x'"),
    ],
)
def test_wrong_input_is_refused(tmp_path, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    names = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file")}
    with pytest.raises(ValueError, match=message):
        main(["--sources", *(names.get(word, word) for word in words)])
