"""What the documentation's site is made of: the files where they stand in the repository, so that their links hold in
both. Knows mkdocs alone, which calls it."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PARTS = (
    "*.md",
    "LICENSE",
    "NOTICE",
    "CITATION.cff",
    "recipes/*.yaml",
    "docs/*.md",
    "benchmarks/*.md",
    "benchmarks/results/*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's pages and pictures in place of those of `docs_dir`; what the theme brings stays."""
    root = Path(config.config_file_path).parent
    paths = sorted(path for part in PARTS for path in root.glob(part))
    ours = [
        File(path.relative_to(root).as_posix(), str(root), config.site_dir, config.use_directory_urls) for path in paths
    ]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *ours])
