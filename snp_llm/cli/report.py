"""`snp-llm report`: the pages of finished folders. Parses no arguments."""

import logging
from pathlib import Path

from snp_llm.checkpoint import contents
from snp_llm.recipe.commands import ReportRecipe, Talk
from snp_llm.report import page
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.files import write_text
from snp_llm.runtime.terminal import print_json

log = logging.getLogger("snp_llm")


def write_page(folder: Path) -> None:
    """Writes the page of a model that is saved already: it is worth having, and not worth losing that model for."""
    try:
        page.write_page(folder)
    except KeyboardInterrupt:
        raise SnpError(f"interrupted; {folder} is complete but for {contents.PAGE}: snp-llm report {folder}") from None
    except Exception as error:  # matplotlib, jinja2, fonts, a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning(f"{folder} is complete but for {contents.PAGE} ({reason}); later: snp-llm report {folder}")


def run_report(recipe: ReportRecipe, talk: Talk) -> None:
    """Write the page of every folder, each beside the others."""
    folders = list(dict.fromkeys(Path(folder) for folder in recipe.folders))
    texts = [page.page_of(folder, [other for other in folders if other != folder]) for folder in folders]
    pages = [folder / contents.PAGE for folder in folders]
    for file, text in zip(pages, texts, strict=True):  # all of them, or none
        write_text(file, text)
    if talk.json:
        print_json({"pages": [str(written) for written in pages]})
    else:
        print(*pages, sep="\n")
