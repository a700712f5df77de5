"""The explorer in the browser: `python -m analysis.explore`. Everything but `page` works without Gradio."""
