"""`python -m dyvte.convert SOURCE TARGET`: a checkpoint of the LLaVA code base as a transformers folder.

Reads LLaVA-1.5, VILA and InternVL-Chat (the one on the LLaVA code base) and writes safetensors, configs and a processor
that `dyvte.load` and transformers take. The weights are read, renamed and written one tensor at a time. The way in for
what cannot be converted (several vision towers, multi-scale images) is `dyvte/conversion/export_visual_tokens.py`.
"""

from __future__ import annotations

import json
import sys

from omegaconf import DictConfig

from dyvte.conversion.checkpoint import convert
from dyvte.runs.config import command


@command("convert")
def main(cfg: DictConfig) -> None:
    """Convert as `conf/convert.yaml` says."""
    names = ("revision", "vision_tower", "chat_template", "dtype", "shard_gigabytes", "overwrite")
    convert(cfg.source, cfg.target, **{name: cfg[name] for name in names})


def name_positional(words: list[str]) -> list[str]:
    """Command-line words with the first two plain ones named: `A B x=1` -> `source='A' target='B' x=1`."""
    names = iter(("source", "target"))
    named = []
    for word in words:
        plain = not word.startswith("-") and "=" not in word
        name = next(names, None) if plain else None
        named.append(word if name is None else f"{name}={json.dumps(word)}")
    return named


if __name__ == "__main__":
    sys.argv[1:] = name_positional(sys.argv[1:])
    main()
