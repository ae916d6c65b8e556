"""Images as people name them: folders of files, datasets, saved or on the Hub. Decodes none of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snp_llm.data.sources import Purpose, is_saved
from snp_llm.runtime.errors import SnpError, reason, shown

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

USUAL_SPLITS: dict[Purpose, tuple[str, ...]] = {
    "calibration": ("train", "training"),
    "evaluation": ("test", "validation", "val", "valid"),
}

NOISE = "noise"


@dataclass(frozen=True)
class Pictures:
    """Images as people name them.

    Attributes:
        name: folder of image files, in folders by class or not; a parquet file; a folder that `datasets` saved; a hub
            id; `noise`.
        split: of it; None: the usual one for the purpose, or all where there are none.
        image, label: columns of a dataset.
    """

    name: str
    split: str | None = None
    image: str = "image"
    label: str = "label"


def check_pictures(pictures: Pictures, purpose: Purpose) -> None:
    """Raises SnpError for what no images are called, and for local ones that are not there."""
    if pictures.name == NOISE and purpose == "calibration":
        return
    path = Path(pictures.name)
    if path.is_dir() and not is_saved(path):
        _files(pictures, purpose)
    elif path.exists() and path.suffix != ".parquet":
        raise SnpError(f"images {pictures.name}: expected a folder of images or a .parquet file.")
    elif not path.exists() and (pictures.name.count("/") != 1 or pictures.name[0] in "./~"):
        raise SnpError(
            f"images {shown(pictures.name)}: no such folder or file; expected a folder of images, a .parquet file, a "
            f"hub id (user/name){' or noise' if purpose == 'calibration' else ''}."
        )


def open_pictures(pictures: Pictures, purpose: Purpose) -> tuple[Any, str]:
    """Rows of images and labels, a sequence or a stream, and what people call them.

    Raises:
        SnpError: no such images or split, or they cannot be read.
    """
    check_pictures(pictures, purpose)
    path = Path(pictures.name)
    if path.is_dir() and not is_saved(path):
        return _files(pictures, purpose)
    from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()

    class Rows(Sequence[Any]):
        def __init__(self, dataset: Dataset) -> None:
            self.dataset = dataset

        def __len__(self) -> int:
            return len(self.dataset)

        def __getitem__(self, at: Any) -> Any:
            return self.dataset[at]

    def opened() -> tuple[Any, str]:
        if path.suffix == ".parquet":
            return Rows(load_dataset("parquet", data_files=str(path), split="train")), path.name
        if path.is_dir():
            found: Any = load_from_disk(str(path))
            if isinstance(found, DatasetDict):
                split = _split_of(list(found), pictures, purpose)
                return Rows(found[split]), f"{path.resolve().name} ({split})"
            return Rows(found), path.resolve().name
        found = load_dataset(pictures.name, streaming=True)
        split = _split_of(list(found), pictures, purpose)
        return found[split], f"{pictures.name} ({split})"

    try:
        return opened()
    except SnpError:
        raise
    except Exception as error:  # datasets, fsspec and pyarrow raise dozens of kinds
        raise SnpError(f"images {pictures.name} cannot be read: {reason(error)}.") from error


def _split_of(there: list[str], pictures: Pictures, purpose: Purpose) -> str:
    wanted = USUAL_SPLITS[purpose] if pictures.split is None else (pictures.split,)
    found = next((split for split in wanted if split in there), None)
    if found is None:
        raise SnpError(f"images {pictures.name}: expected a split {' or '.join(wanted)}; it has {', '.join(there)}.")
    return found


def _files(pictures: Pictures, purpose: Purpose) -> tuple[Sequence[dict[str, Any]], str]:
    """Image files of a folder; what stands for the label is the folder that a file is in, if files are in folders."""
    folder = Path(pictures.name)
    there = [child.name for child in folder.iterdir() if child.is_dir()]
    wanted = USUAL_SPLITS[purpose] if pictures.split is None else (pictures.split,)
    split = next((split for split in wanted if split in there), None)
    if pictures.split is not None and split is None:
        found = ", ".join(there) or "none"
        raise SnpError(f"images {folder}: expected a folder {pictures.split} in it; it has {found}.")
    inside = folder if split is None else folder / split
    files = sorted(file for file in inside.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise SnpError(f"images {inside}: expected image files ({', '.join(ENDINGS[:4])}, ...), found none.")
    name = folder.resolve().name
    label = name if split is None else f"{name} ({split})"
    rows = [
        {pictures.image: file, pictures.label: None if file.parent == inside else file.parent.name} for file in files
    ]
    return rows, label


def class_names(rows: Any, pictures: Pictures) -> Sequence[str]:
    """What a dataset calls its classes, in its order; nothing where it does not say."""
    features = getattr(getattr(rows, "dataset", rows), "features", None) or {}
    return getattr(features.get(pictures.label), "names", None) or ()


def labels_of(rows: Any, pictures: Pictures) -> Sequence[Any]:
    """The labels of all rows, where that is known without decoding the images; none of a stream."""
    if isinstance(rows, list):
        return [row[pictures.label] for row in rows]
    dataset = getattr(rows, "dataset", None)
    columns = getattr(dataset, "column_names", None) or ()
    return list(dataset[pictures.label]) if dataset is not None and pictures.label in columns else []
