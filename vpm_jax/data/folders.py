"""Finding a dataset and listing the images of its splits, by the layouts of `vpm_jax.data.datasets`.

Market-1501 and similar           bounding_box_train/0002_c1s1_000451_03.jpg
Partial-REID, Occluded-REID ...   partial_body_images/001_001.jpg, or a folder per identity
MSMT17                            list_train.txt, with a path and an identity per line
own folders of identities         query/anna/1_c2s1.jpg
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpm_jax.data.datasets import DATASETS, Entry, Layout
from vpm_jax.data.decode import SUFFIXES, UNSUPPORTED
from vpm_jax.data.files import ARCHIVE_SUFFIXES, FolderTree, Tree, ZipTree, below, open_zip
from vpm_jax.data.split import Listing, Reader, counted, number_identities, some
from vpm_jax.errors import UserError

PREPARED = "dataset_info.json"  # which TFDS writes into a prepared dataset
_FORMS = ("prepared", "csv", "folder", "zip")  # in order of preference
_COMMON = {"train", "test", "query", "gallery"}  # folder names that do not identify a dataset
_UNREAD = (*UNSUPPORTED, ".part", ".tmp", ".crdownload")  # also unfinished downloads
_LISTS = {"train": ("list_train.txt", "list_val.txt"), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}
_OPTIONAL_LISTS = ("list_val.txt",)
_RENAME = "rename them, or list them in a CSV (config.data.name=csv)"


@dataclass(frozen=True)
class Place:
    """The location of a dataset."""

    form: str  # "folder" | "zip" | "prepared" | "csv"
    path: Path

    def __str__(self) -> str:
        return f"the {dict(prepared='prepared folder', csv='CSV').get(self.form, self.form)} {self.path}"


def locate(root: Path, name: str, search: bool = True) -> Place | None:
    """Finds the dataset `name` at `root` and, with `search`, under usual names below `root`. None if there is none.

    A prepared copy is preferred to a folder and a folder to a zip; among equals, the first by name. Raises UserError
    if several variants of the dataset are there.
    """
    entry = DATASETS[name]
    if root.is_file():
        form = "csv" if name == "csv" else "zip"
        return Place("prepared", root.parent) if root.name == PREPARED else Place(form, root)
    try:
        places = sorted(_places(root, entry, 2 if search else 0), key=lambda p: _FORMS.index(p.form))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
    variants = [place for place in places if place.form == "folder" and _variant(place.path.name, entry)]
    if len(variants) > 1 and places[0] in variants:
        paths = " and ".join(str(place.path) for place in variants)
        raise UserError(f"{root} contains {paths}: set config.data.root (evaluate: --root) to one of them.")
    return places[0] if places else None


def _places(root: Path, entry: Entry, depth: int) -> Iterator[Place]:
    if (root / PREPARED).is_file():
        yield Place("prepared", root)
        return
    children = sorted(root.iterdir())
    if entry.layout is None:
        tables = [child for child in children if child.suffix.lower() == ".csv" and child.is_file()]
        tables = [table for table in tables if table.name.lower() == "dataset.csv"] or tables
        if len(tables) > 1:
            names = ", ".join(table.name for table in tables[:5]) + ", ..." * (len(tables) > 5)
            raise UserError(f"{root} contains several CSV files ({names}): set config.data.root to one of them.")
        yield from (Place("csv", table) for table in tables)
    elif _holds(FolderTree(root), entry.layout, entry.is_usual(root.name)):
        yield Place("folder", root)
    for child in children:
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name) and (child / PREPARED).is_file():
            yield Place("prepared", child)
        elif depth and child.is_dir() and entry.is_usual(child.name):
            yield from _places(child, entry, depth - 1)
        elif depth and entry.layout and child.suffix.lower() == ".zip" and entry.is_usual(child.stem):
            yield Place("zip", child)


def under_usual_name(root: Path, name: str) -> Path | None:
    """A folder or archive in `root` that has a usual name of the dataset but cannot be read as one; None if none."""

    def is_called_so(path: Path) -> bool:
        archive = path.is_file() and path.suffix.lower() in ARCHIVE_SUFFIXES
        stem = path.name.removesuffix(path.suffix).removesuffix(".tar") if archive else path.name
        return (archive or path.is_dir()) and DATASETS[name].is_usual(stem)

    return next(filter(is_called_so, sorted(root.iterdir())), None)


def _variant(folder: str, entry: Entry) -> str | None:
    """The variant of the dataset that the name of a folder contains."""
    variants = entry.layout.variants if entry.layout else ()
    return next((variant for variant in variants if variant in folder.lower()), None)


def _find(tree: Tree, path: str) -> str | None:
    """The folder at `path` spelled as in the tree, whatever its case; None if there is none."""
    folder = ""
    for name in path.split("/"):
        matches = [child for child in sorted(tree.entries(folder).folders) if child.lower() == name.lower()]
        if not matches:
            return None
        folder = f"{folder}/{matches[0]}" if folder else matches[0]
    return folder


def _split_folders(tree: Tree, names: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """{split: its folder in the tree} for the splits that have one."""
    candidates = {split: [_find(tree, name) for name in split_names] for split, split_names in names.items()}
    return {split: next(filter(None, folders)) for split, folders in candidates.items() if any(folders)}


def _holds(tree: Tree, layout: Layout, usual: bool) -> bool:
    """Whether the tree holds at least some splits of the dataset.

    A single folder with a common name such as "query" only counts if the tree has a `usual` name of the dataset.
    """
    if any(_find(tree, name) for name in layout.foreign):
        return False
    folders = _split_folders(tree, layout.folders)
    if layout.identity == "lists":
        return any(name in tree.entries().files for names in _LISTS.values() for name in names)
    if layout.identity == "folders":
        return any(tree.entries(folder).folders for folder in folders.values())
    distinctive = any(usual or folder.lower().rpartition("/")[2] not in _COMMON for folder in folders.values())
    return distinctive or len(folders) > 1


def list_splits(place: Place, name: str) -> tuple[Reader, dict[str, Listing], list[str]]:
    """Lists the images of the dataset `name` in a folder or zip: (their reader, {split: images}, notes).

    Raises:
      UserError: if a split is missing or empty, most images have unexpected names, or a zip is truncated, protected by
        a password, or does not contain exactly one dataset.
    """
    entry = DATASETS[name]
    assert entry.layout is not None
    tree = _in_zip(place.path, entry) if place.form == "zip" else FolderTree(place.path)
    folders = _split_folders(tree, entry.layout.folders)
    missing = [official for split, official in entry.layout.official.items() if split not in folders]
    if entry.layout.identity == "folders" and folders.keys() == {"train"}:
        missing = []  # the test set may be identities held out from training
    elif entry.layout.identity == "folders":
        missing = [official for official in missing if official != "train"]
    if missing:
        raise UserError(
            f"{tree.where} has {', '.join(folders.values())} but no {' and no '.join(missing)}; expected all of "
            f"{', '.join(entry.layout.official.values())}: complete it from the official archive."
        )
    list_images = {"names": _by_names, "lists": _by_lists, "folders": _by_folders}[entry.layout.identity]
    listings, notes = list_images(tree, entry.layout, folders)
    ignored = [file for split in folders for file in listings[split].ignored]
    if ignored:
        files = counted(len(ignored), "file")
        notes.insert(0, f"Ignored {files} not named like an image of a person: {some(ignored)}.")
    if variant := _variant((tree.inside.rstrip("/") if isinstance(tree, ZipTree) else place.path.name), entry):
        notes.append(f"These are the {variant} images of {entry.title}.")
    return tree.reader, listings, notes


def _in_zip(path: Path, entry: Entry) -> ZipTree:
    """The only folder in a zip, or in the zips inside it, that holds the dataset."""
    open_zip.cache_clear()  # the file may have been replaced since this process last read it
    assert entry.layout is not None
    outer = ZipTree(path)
    trees = _datasets(outer, entry, path.stem)
    files = [f"{folder}/{file}" if folder else file for folder, e in outer.folders.items() for file in e.files]
    inner = [file for file in sorted(files) if file.lower().endswith(".zip") and "/._" not in f"/{file}"]
    usual = [member for member in inner if entry.is_usual(Path(member).stem)]
    for member in [] if trees else usual or inner:
        trees += _datasets(ZipTree(path, member), entry, Path(member).stem)
    if len(trees) == 1:
        return trees[0]
    official = list(entry.layout.official.values())
    names = ", ".join(f"{tree.member}/{tree.inside}" if tree.member else tree.inside for tree in trees)
    content = f"several datasets ({names})" if trees else f"no folder {official[0]}"
    raise UserError(
        f"The zip {path} contains {content}; expected one dataset with the folders {', '.join(official)}: "
        "get the official zip, or unpack this one and set config.data.root to the folder inside."
    )


def _datasets(tree: ZipTree, entry: Entry, stem: str) -> list[ZipTree]:
    """The folders that hold the dataset in a zip named `stem`. Those with a usual name, if any, hide the others."""
    assert entry.layout is not None
    usual = {path: entry.is_usual(path.rpartition("/")[2] or stem) for path in sorted(tree.folders)}
    paths = [path for path in usual if _holds(tree.at(path), entry.layout, usual[path])]
    if len(paths) > 1:
        paths = [path for path in paths if usual[path]] or paths
    return [tree.at(path) for path in paths]


def _by_names(tree: Tree, layout: Layout, folders: dict[str, str]) -> tuple[dict[str, Listing], list[str]]:
    """The splits of a layout with the identity in each image's name, and notes."""
    optional = _split_folders(tree, layout.optional)
    listings = {split: _listing(tree, folder, layout) for split, folder in (folders | optional).items()}
    notes = []
    for name in layout.unused:
        if folder := _find(tree, name):
            images = counted(sum(map(_is_image, below(tree, folder, layout.depth)[0])), "image")
            notes.append(f"Left out {folder} ({images}), which the protocol does not use.")
    return listings, notes


def _listing(tree: Tree, folder: str, layout: Layout) -> Listing:
    kept: list[tuple] = []
    ignored, unusable = [], []
    files, broken = (sorted(set(names)) for names in below(tree, folder, layout.depth))
    for name in files:
        match = layout.name.match(_base(name))
        if match and _is_image(name):
            kept.append((f"{folder}/{name}", *map(int, match.groups())))
        elif match and name.lower().endswith(_UNREAD):
            unusable.append(f"{folder}/{name}")
        else:
            ignored.append(f"{folder}/{name}")
    for name in broken:
        belongs = layout.name.match(_base(name)) and (_is_image(name) or (layout.depth > 0 and "." not in name))
        (unusable if belongs else ignored).append(f"{folder}/{name}")
    others = [name for name in ignored if _is_image(name)]
    if not kept and not unusable:
        content = "no file"
        if ignored:
            content = f"no image among {counted(len(ignored), 'file')} such as {_base(ignored[0])}"
        raise UserError(
            f"{tree.where} has {content} in {folder}; expected images named {layout.example}: "
            "complete it from the official archive."
        )
    if len(others) > len(kept) + len(unusable):
        raise UserError(
            f"{tree.where} has {len(others):,} of {len(others) + len(kept) + len(unusable):,} images in {folder} that "
            f"are not named {layout.example}: {([k[0] for k in kept] + unusable)[0]} is, "
            f"{others[0]} is not; {_RENAME}."
        )
    _check_folders(tree, kept)
    names, identity, *camera = zip(*kept, strict=True) if kept else ((), ())
    cameras = np.array(camera[0], np.int32) if camera else None
    return Listing(tuple(names), np.array(identity, np.int32), cameras, tuple(ignored), tuple(unusable))


def _check_folders(tree: Tree, kept: list[tuple]) -> None:
    """Raises UserError if numbered folders and the identities in image names contradict each other."""
    first: dict[tuple[str, int], tuple[int, str]] = {}
    for name, identity, *_ in kept:
        folder = name.split("/")[-2]
        if not re.fullmatch(r"[0-9]{1,9}", folder):
            continue
        for key, value in ((("folder", int(folder)), identity), (("identity", identity), int(folder))):
            expected, other = first.setdefault(key, (value, name))
            if value != expected:
                raise UserError(
                    f"{tree.where} has {other} and {name}, whose folders and names disagree about the identity; "
                    f"expected the identity at the start of each name: {_RENAME}."
                )


def _by_lists(tree: Tree, layout: Layout, folders: dict[str, str]) -> tuple[dict[str, Listing], list[str]]:
    """The splits of MSMT17's layout, and notes.

    The lists number training and test identities from 0 each. Here training identities start at 1 and test identities
    follow them.
    """
    listings, notes = {}, []
    files = {folder: set(below(tree, folder, layout.depth)[0]) for folder in set(folders.values())}
    listed: dict[str, set[str]] = {folder: set() for folder in files}
    first = 1
    for split, folder in folders.items():
        rows, unusable = [], []
        for name in _LISTS[split]:
            if name not in tree.entries().files:
                if name not in _OPTIONAL_LISTS:
                    raise UserError(f"{tree.where} has no {name}: complete it from the official archive.")
                notes.append(f"There is no {name}.")
                continue
            for image, identity, camera in _rows(tree, name, layout):
                listed[folder].add(image)
                if image in files[folder]:
                    rows.append((f"{folder}/{image}", identity, camera))
                else:
                    unusable.append(f"{folder}/{image}")
        rows.sort()
        numbers = np.array([identity for _, identity, _ in rows], np.int32) + first
        cameras = np.array([camera for *_, camera in rows], np.int32)
        listings[split] = Listing(tuple(row[0] for row in rows), numbers, cameras, (), tuple(sorted(unusable)))
        if split == "train":
            first = int(numbers.max(initial=0)) + 1
    for folder, images in files.items():
        if unlisted := sorted(filter(_is_image, images - listed[folder])):
            left_out = counted(len(unlisted), "image")
            notes.append(f"Left out {left_out} of {folder} missing from the lists: {some(unlisted)}.")
    return listings, notes


def _rows(tree: Tree, name: str, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """Yields the path, the identity and the camera of each line of a list."""
    for line, text in enumerate(tree.reader.read(name, 0).decode("utf-8", "surrogateescape").splitlines(), 1):
        if not text.strip():
            continue
        image, _, identity = text.strip().replace("\\", "/").rpartition(" ")
        camera = layout.name.match(_base(image))
        if not re.fullmatch(r"[0-9]{1,9}", identity) or not camera:
            raise UserError(
                f"Line {line} of {name} ({tree.where[0].lower()}{tree.where[1:]}) is {text.strip()!r}, "
                f"expected a path and an identity, with images named {layout.example}."
            )
        yield image.strip(), int(identity), int(camera[1])


def _by_folders(tree: Tree, layout: Layout, folders: dict[str, str]) -> tuple[dict[str, Listing], list[str]]:
    """The splits of a layout with a folder per identity, which may have any name, and notes."""
    contents = {}
    for split, folder in folders.items():
        files, broken = below(tree, folder, layout.depth)
        images = sorted(name for name in set(files) if "/" in name and _is_image(name))
        unusable = [name for name in files if "/" in name and name.lower().endswith(_UNREAD)]
        unusable += [name for name in broken if _is_image(name) or "." not in name]
        ignored = sorted({*files, *broken} - {*images, *unusable})
        contents[split] = images, ignored, sorted(unusable)
    numbers = number_identities({name.partition("/")[0] for images, *_ in contents.values() for name in images})
    cameras = {split: [layout.name.match(_base(name)) for name in images] for split, (images, *_) in contents.items()}
    tests = [match for split in ("query", "gallery") for match in cameras.get(split, ())]
    if any(tests) and not all(tests):
        names = [f"{folders[split]}/{name}" for split in ("query", "gallery") for name in contents[split][0]]
        with_camera = [match is not None for match in tests]
        raise UserError(
            f"{tree.where} has images with a camera in their names, such as "
            f"{names[with_camera.index(True)]}, and others without, such as "
            f"{names[with_camera.index(False)]}: {_RENAME}."
        )
    listings = {}
    for split, (images, ignored, unusable) in contents.items():
        folder = folders[split]
        listings[split] = Listing(
            tuple(f"{folder}/{name}" for name in images),
            np.array([numbers[name.partition("/")[0]] for name in images], np.int32),
            np.array([int(m[1]) for m in cameras[split] if m], np.int32) if all(cameras[split]) else None,
            tuple(f"{folder}/{name}" for name in ignored),
            tuple(f"{folder}/{name}" for name in unusable),
        )
    return listings, []


def list_distractors(path: Path) -> tuple[Reader, Listing]:
    """The images in a folder or zip of distractors, all with identity 0; the camera is 0 if the name has none.

    Raises:
      UserError: if there are no images, or one is named like an image of a person.
    """
    tree = ZipTree(path) if path.is_file() else FolderTree(path)
    files, broken = below(tree, "", 99)
    names = sorted(filter(_is_image, files))
    unusable = sorted(filter(_is_image, broken))
    if not names and not unusable:
        raise UserError(f"{path} (config.data.distractors) contains no images: choose another folder or zip.")
    layout = DATASETS["market1501"].layout
    assert layout is not None
    matches = [layout.name.match(_base(name)) for name in names]
    for name, match in zip(names, matches, strict=True):
        if match and int(match[1]) > 0:
            raise UserError(
                f"{path} (config.data.distractors) contains {name}, named like an image of a person: "
                "expected only distractors."
            )
    camera = np.array([int(match[2]) if match else 0 for match in matches], np.int32)
    return tree.reader, Listing(tuple(names), np.zeros(len(names), np.int32), camera, (), tuple(unusable))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _base(name).startswith(".")
