"""Hooks of `mkdocs build` (mkdocs.yml): what the site shows beside the pages that lie in docs/."""
