"""What results on the shipped model depend on."""

import hashlib

from dyvte.gates.module import SHIPPED_GATES
from dyvte.loading import SHIPPED_MODELS


def shipped_files() -> dict[str, str]:
    """Digests of what results on the shipped model depend on: its weights with configuration and tokenizer, its gates.

    The model card, which is written after the fact, is left out.
    """
    digests = {}
    for name, folder in (("weights", SHIPPED_MODELS["llava_shapes"]), ("gates", SHIPPED_GATES["llava_shapes"])):
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".md" and not file.name.startswith("."):
                digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
        digests[name] = digest.hexdigest()[:16]
    return digests
