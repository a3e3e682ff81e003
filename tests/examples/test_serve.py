"""examples/serve.py answers as the classifier does, in a process that has neither torch nor transformers."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_CLIP, shake
from peft import get_peft_model
from PIL import Image
from transformers import CLIPModel

from capt_peft import CaptConfig, ZeroShotClassifier, export
from capt_peft.clip.calibration import texts_digest
from capt_peft.tuner import Calibration
from capt_peft.tuner.fingerprint import adapter_fingerprint, base_fingerprint

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCKED = ("torch", "transformers", "peft", "capt_peft", "datasets", "onnx")
SERVER = f"""
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np
import serve
from fastapi.testclient import TestClient
from PIL import Image

client, answers = TestClient(serve.app), []
for place in sys.argv[1:]:
    answer = client.post("/", content=Path(place).read_bytes(), headers={{"Content-Type": "image/png"}})
    answers.append([answer.status_code, answer.json()])
    if answer.status_code == 200:
        np.save(place + ".npy", serve.pixels_of(Image.open(place)))
assert not {set(BLOCKED)} & sys.modules.keys()
print(json.dumps(answers))
"""


def pictures():
    """Of every shape, with every grey, and half transparent."""
    generator = np.random.default_rng(0)
    noise = {
        size: generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        for size in ((40, 50), (51, 33), (20, 32), (97, 40))
    }
    found = {f"{h}x{w}": Image.fromarray(array) for (h, w), array in noise.items()}
    found["greys"] = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8))
    found["transparent"] = Image.fromarray(generator.integers(0, 256, (40, 44, 4), dtype=np.uint8))
    return found


def save_modes(folder):
    """Writes one noisy picture in every mode of Pillow that a file can have; returns those that are taken, and the others."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 44, 4), dtype=np.uint8))
    opaque, grey = noise.convert("RGB"), np.asarray(noise)[..., 0]
    palette = opaque.quantize(16)
    files = {
        "1.png": opaque.convert("1"), "L.png": opaque.convert("L"), "LA.png": noise.convert("LA"), "P.png": palette,
        "RGBA.tif": noise, "RGBA.webp": noise, "CMYK.tif": opaque.convert("CMYK"), "CMYK.jpg": opaque.convert("CMYK"),
        "LAB.tif": opaque.convert("LAB"), "PA.tif": palette.convert("PA"), "YCbCr.jpg": opaque.convert("YCbCr"),
        "RGBX.tif": opaque.convert("RGBX"), "P.gif": palette, "RGB.bmp": opaque,
        "I16.png": Image.fromarray(grey.astype(np.uint16) * 257), "I16.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "I.tif": Image.fromarray(grey.astype(np.int32) * 257), "F.tif": Image.fromarray(grey.astype(np.float32) / 255),
    }  # fmt: skip
    for name, picture in files.items():
        picture.save(folder / name, **({"lossless": True} if name == "RGBA.webp" else {}))
    palette.save(folder / "P with transparency.png", transparency=3)
    palette.save(folder / "P with alpha.png", transparency=bytes(range(0, 256, 16)))
    opaque.convert("L").save(folder / "L with transparency.png", transparency=100)
    opaque.convert("1").save(folder / "1 with transparency.png", transparency=0)
    opaque.save(folder / "RGB with transparency.png", transparency=opaque.getpixel((3, 3)))
    paths = sorted(folder.iterdir())
    return [path for path in paths if path.name[0] not in "IF"], [path for path in paths if path.name[0] in "IF"]


@torch.no_grad()
def calibrate(classifier):
    """Stores a calibration that holds for the classifier and rejects some of the pictures."""
    largest = classifier(classifier.transform.batch(list(pictures().values()))).amax(1)
    calibration = Calibration(
        temperature=2.5, threshold=float(largest.median()) + 1e-3, false_rejection_rate=0.5, false_positive_rate=0.1, images=6,
        class_thresholds=[0.0] * 3, task="pictures", split="validation", class_names=list(classifier.class_names),
        texts=texts_digest(classifier), strength=1.0, fingerprint=adapter_fingerprint(classifier.model),
        base=base_fingerprint(classifier.model), precision="float32",
    )  # fmt: skip
    classifier.model.peft_config["default"].calibration = calibration.to_dict()
    assert classifier.calibration == calibration


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_server_needs_no_torch_and_gives_the_classifiers_scores(processor, tmp_path, calibrated):
    pytest.importorskip("fastapi", reason="the example needs FastAPI: pip install 'capt-peft[app]' has it")
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32), CaptConfig())
    shake(model)
    classifier = ZeroShotClassifier(model.eval(), processor, ["red circle", "green square", "seven"])
    if calibrated:
        calibrate(classifier)
    export(classifier, tmp_path / "model.onnx")
    paths = {name: tmp_path / f"{name}.png" for name in pictures()}
    for name, picture in pictures().items():
        picture.save(paths[name])
    turned = Image.Exif()
    turned[274] = 6
    paths["turned"] = tmp_path / "turned.png"
    Image.open(paths["40x50"]).save(paths["turned"], exif=turned)
    (tmp_path / "modes").mkdir()
    modes, deep = save_modes(tmp_path / "modes")
    paths |= {path.name: path for path in modes}
    (tmp_path / "damaged.png").write_bytes(paths["40x50"].read_bytes()[:300])
    Image.open(paths["40x50"]).save(tmp_path / "program.eps")
    bad = [tmp_path / "damaged.png", tmp_path / "program.eps"]
    done = subprocess.run(
        [sys.executable, "-c", SERVER, *paths.values(), *deep, *bad],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES), "MODEL": str(tmp_path / "model.onnx")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers[-2:] == [[422, {"detail": "This cannot be read as an image."}]] * 2
    too_deep = "Grey of more than 8 bits is not taken. Save the image with 8 bits."
    assert len(deep) == 4 and answers[-6:-2] == [[422, {"detail": too_deep}]] * 4  # `predict` scales it
    rejected = [not classifier.predict(path, reject=True)[0] if calibrated else False for path in paths.values()]
    assert len(set(rejected)) == 1 + calibrated  # some are accepted, and only a calibrated one rejects others
    for (name, path), (status, answer), no_class in zip(paths.items(), answers[:-6], rejected, strict=True):
        pixels = np.load(f"{path}.npy")
        np.testing.assert_allclose(pixels, classifier.transform(path).numpy(), rtol=0, atol=1e-7, err_msg=name)
        expected = {row["label"]: row["score"] for row in classifier.predict(path)[0]}
        assert status == 200 and answer["scores"] == pytest.approx(expected, abs=1e-5)
        assert answer["none_of_these"] is no_class


def test_the_example_is_short():
    code = (EXAMPLES / "serve.py").read_text(encoding="utf-8").split('"""\n', 2)[2]
    lines = [line for line in io.StringIO(code) if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 36
