"""The explorer in the browser: `python -m analysis.explore` (docs/explorer.md)."""

from __future__ import annotations

from omegaconf import DictConfig

from dyvte.data.base import build_dataset
from dyvte.errors import ConfigError
from dyvte.runs.config import command, load_model

from .explorer import Explorer


@command("explore")
def main(cfg: DictConfig) -> None:
    """Serve the page that `conf/explore.yaml` describes until it is interrupted."""
    try:
        from .serving import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError("the explorer needs Gradio: pip install 'dyvte[explore]'") from error
    explorer = Explorer.of(load_model(cfg), build_dataset(cfg.data), cfg)
    serve(explorer, cfg).block_thread()


if __name__ == "__main__":
    main()
