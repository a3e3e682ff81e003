"""Serves an exported file, with neither torch nor transformers.

MODEL=outputs/demo/model.onnx uvicorn --app-dir examples serve:app
curl --data-binary @image.png -H "Content-Type: image/png" localhost:8000     # pip install fastapi uvicorn onnxruntime pillow
"""

import io
import json
import os
from typing import Any

import numpy as np
import onnxruntime
from fastapi import Body, FastAPI, HTTPException
from PIL import Image, ImageOps

model = onnxruntime.InferenceSession(os.environ["MODEL"])
about = json.loads(model.get_modelmeta().custom_metadata_map["capt_peft"])
calibration = about["calibration"] or {"temperature": 1, "threshold": -np.inf}  # of capt-peft calibrate
resize, crop = (about["preprocessing"][name] for name in ("resize", "center_crop"))
FORMATS = (
    "BMP",
    "GIF",
    "JPEG",
    "PNG",
    "TIFF",
    "WEBP",
)  # of others Pillow opens some with programs that are not its own
app = FastAPI()


def pixels_of(image: Image.Image) -> np.ndarray:
    """Returns an image as (3, H, W) float32 in [0, 1], as the description says."""
    if image.mode[0] in "IF":  # convert would clip it; with capt-peft, ZeroShotClassifier.predict scales it
        raise HTTPException(422, "Grey of more than 8 bits is not taken. Save the image with 8 bits.")
    image = ImageOps.exif_transpose(image).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if resize:
        short = resize.get("shortest_edge")
        size = [int(short * n / min(image.size)) for n in image.size] if short else (resize["width"], resize["height"])
        image = image.resize(size, Image.Resampling[about["preprocessing"]["resample"].upper()])
    if crop:
        left, top = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255


@app.post("/")
def classify(body: bytes = Body(media_type="image/*")) -> dict[str, Any]:
    """Returns the score of each class, and whether the image is none of them."""
    try:
        pixels = pixels_of(Image.open(io.BytesIO(body), formats=FORMATS))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(422, "This cannot be read as an image.") from error
    logits = model.run(["logits"], {"pixels": pixels[None]})[0][0]
    scores = np.exp((logits - logits.max()) / calibration["temperature"])
    named = dict(zip(about["class_names"], (scores / scores.sum()).tolist(), strict=True))
    return {"scores": named, "none_of_these": bool(logits.max() < calibration["threshold"])}
