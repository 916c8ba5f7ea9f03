"""The licence of published weights, as far as it is recorded with them on this machine."""

import re
from pathlib import Path

from refilled.models.backbone import Backbone
from refilled.models.timm_backbone import TimmBackbone


def licence_of(name: str, network: Backbone) -> str | None:
    """Return the licence of a teacher's weights; None if it is not known. Nothing is downloaded.

    Args:
        name: The teacher's name in a run. For ``timm/NAME`` and ``timm/NAME.TAG:FILE`` timm's metadata of these weights
            are read, for ``hf:FOLDER`` the model card in the folder.
        network: The teacher.
    """
    if isinstance(network, TimmBackbone) and name.startswith("timm/"):
        architecture, file, _ = name.partition(":")
        if not file or "." in architecture:  # a file without a tag may hold any weights
            found = network.body.pretrained_cfg.get("license")
            return None if found is None else str(found)
    if name.startswith("hf:"):
        return _in_card(Path(name.removeprefix("hf:")) / "README.md")
    return None


def _in_card(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    metadata = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = metadata and re.search(r"^license:[ \t]*[\"']?([^\s\"'#]+)", metadata[1], re.MULTILINE)
    return found[1] if found else None
