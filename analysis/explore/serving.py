"""The page on a port of this machine."""

from __future__ import annotations

import logging

import gradio as gr
from omegaconf import DictConfig

from dyvte.errors import ConfigError

from .explorer import Explorer
from .page import Page, asset

FONTS = ["system-ui", "sans-serif"]  # none that would have to be fetched

logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks itself whether it is up; Hydra shows INFO


def serve(explorer: Explorer, cfg: DictConfig) -> gr.Blocks:
    """Start the server; it runs until `close()`."""
    blocks = Page(explorer, cfg).blocks
    blocks.queue(max_size=cfg.queue, api_open=False)
    try:
        blocks.launch(
            server_name=cfg.host,
            server_port=cfg.port or None,
            inbrowser=cfg.open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            allowed_paths=[],
            max_file_size=1,  # images come with their events: the road for files stays closed
            footer_links=[],
            theme=gr.themes.Base(font=FONTS, font_mono=["monospace"]),
            css=asset("explore.css"),
        )
    except OSError as error:
        raise ConfigError(f"port={cfg.port} on {cfg.host} cannot be used ({error}); give another one") from error
    print(f"explorer: {blocks.local_url} (Ctrl-C ends it)", flush=True)
    return blocks
