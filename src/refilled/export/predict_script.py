"""Name the class of images: python predict.py MODEL.onnx IMAGE... (needs numpy, pillow, onnxruntime)."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, *paths: str) -> None:
    """Print one JSON object per image."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    size = about["size"]
    for path in paths:
        file = Image.open(path)
        file.draft(None, (2 * size, 2 * size))
        image: Image.Image = ImageOps.exif_transpose(file).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[None])
        if not about["preprocess"]:
            mean, std = (np.float32(about[key]).reshape(1, -1, 1, 1) for key in ("mean", "std"))
            pixels = (pixels.astype(np.float32) / 255 - mean) / std
        logits = session.run(None, {"images": pixels})[0][0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        best = int(shares.argmax())
        print(json.dumps({"image": path, "class": about["classes"][best], "probability": shares[best] / shares.sum()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
