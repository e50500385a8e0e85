"""Where a dataset lies, and the images of its splits by the layout that `vpm_jax.data.datasets` describes.

Market-1501 and others in its layout    bounding_box_train/0002_c1s1_000451_03.jpg
Partial-REID, Occluded-REID, ...        partial_body_images/001_001.jpg, or a folder for each identity
MSMT17                                  list_train.txt with lines of a path and an identity
own folders of identities               query/anna/1_c2s1.jpg
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vpm_jax.data.datasets import DATASETS, Entry, Layout
from vpm_jax.data.decode import SUFFIXES
from vpm_jax.data.files import ARCHIVE_SUFFIXES, FolderTree, Tree, ZipTree, below, open_zip
from vpm_jax.data.split import Listing, Reader, number_identities, printable, some
from vpm_jax.errors import UserError

PREPARED = "dataset_info.json"  # the file that TFDS writes into a prepared dataset
_FORMS = ("prepared", "csv", "folder", "zip")  # in order of preference
_COMMON = {"train", "test", "query", "gallery"}  # folder names that alone tell no dataset
# Endings of images that are not read, and of downloads that did not end.
_UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".dng", ".raw", ".part", ".tmp", ".crdownload")
_LISTS = {"train": ("list_train.txt", "list_val.txt"), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}
_OPTIONAL_LISTS = ("list_val.txt",)
_RENAME = "rename them, or list them in a CSV (config.data.name=csv)"


@dataclass(frozen=True)
class Place:
    """A dataset that was found: its form ("folder" | "zip" | "prepared" | "csv") and its path."""

    form: str
    path: Path

    def __str__(self) -> str:
        return f"the {dict(prepared='prepared folder', csv='CSV').get(self.form, self.form)} {self.path}"


def locate(root: Path, name: str, search: bool = True) -> Place | None:
    """Finds the dataset `name` at `root` and, with `search`, under its usual names below `root`; None if there is none.

    A prepared copy goes before a folder and a folder before a zip; among equals the first by name. UserError where
    there are several forms of the dataset, of which one must be chosen.
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
        have = " and ".join(str(place.path) for place in variants)
        raise UserError(f"{root} holds {have}: set config.data.root (evaluate: --root) to one of them.")
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
            raise UserError(f"{root} holds several CSV files ({names}): set config.data.root to one of them.")
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
    """What in `root` is called as the dataset `name` is but is no copy that can be read; None without one."""

    def called(path: Path) -> bool:
        archive = path.is_file() and path.suffix.lower() in ARCHIVE_SUFFIXES
        stem = path.name.removesuffix(path.suffix).removesuffix(".tar") if archive else path.name
        return (archive or path.is_dir()) and DATASETS[name].is_usual(stem)

    return next(filter(called, sorted(root.iterdir())), None)


def _variant(folder: str, entry: Entry) -> str | None:
    """Which of several forms of a dataset a folder is by its name."""
    variants = entry.layout.variants if entry.layout else ()
    return next((variant for variant in variants if variant in folder.lower()), None)


def _find(tree: Tree, path: str) -> str | None:
    """The folder `path`, a name in any case or several with slashes, as it is called in the tree."""
    found = ""
    for part in path.split("/"):
        same = [folder for folder in sorted(tree.entries(found).folders) if folder.lower() == part.lower()]
        if not same:
            return None
        found = f"{found}/{same[0]}" if found else same[0]
    return found


def _split_folders(tree: Tree, folders: Iterable[tuple[str, tuple[str, ...]]]) -> dict[str, str]:
    """{split: its folder in the tree}, without the splits that have none."""
    present = {split: [_find(tree, name) for name in names] for split, names in folders}
    return {split: next(filter(None, found)) for split, found in present.items() if any(found)}


def _holds(tree: Tree, layout: Layout, usual: bool) -> bool:
    """Whether the tree is the dataset, or a part: "query" alone may be of any other, unless the tree has a `usual`
    name."""
    if any(_find(tree, name) for name in layout.foreign):
        return False
    found = _split_folders(tree, layout.folders.items())
    if layout.identity == "lists":
        return any(name in tree.entries().files for names in _LISTS.values() for name in names)
    if layout.identity == "folders":
        return any(tree.entries(folder).folders for folder in found.values())
    told = any(usual or folder.lower().rpartition("/")[2] not in _COMMON for folder in found.values())
    return told or len(found) > 1


def list_splits(place: Place, name: str) -> tuple[Reader, dict[str, Listing], list[str]]:
    """The images of the dataset `name` in a folder or a zip: their reader, their splits, and notes.

    Raises:
      UserError: if a split is missing or has no images, most images are named otherwise, or a zip is truncated, locked
        or holds no dataset or several.
    """
    entry = DATASETS[name]
    assert entry.layout is not None
    tree = _in_zip(place.path, entry) if place.form == "zip" else FolderTree(place.path)
    found = _split_folders(tree, entry.layout.folders.items())
    missing = [official for split, official in entry.layout.official.items() if split not in found]
    if entry.layout.identity == "folders" and "query" not in found and "gallery" not in found and "train" in found:
        missing = []  # for training, where identities may be held out
    elif entry.layout.identity == "folders":
        missing = [official for official in missing if official != "train"]
    if missing:
        raise UserError(
            f"{tree.where} has {', '.join(found.values())} but no {' and no '.join(missing)}; expected all of "
            f"{', '.join(entry.layout.official.values())}: complete it from the official archive."
        )
    list_images = {"names": _by_names, "lists": _by_lists, "folders": _by_folders}[entry.layout.identity]
    listings, notes = list_images(tree, entry.layout, found)
    ignored = [file for split in found for file in listings[split].ignored]
    if ignored:
        one = "file" if len(ignored) == 1 else "files"
        notes.insert(0, f"Ignored {len(ignored):,} {one} not named as an image of a person: {some(ignored)}.")
    if variant := _variant((tree.inside.rstrip("/") if isinstance(tree, ZipTree) else place.path.name), entry):
        notes.append(f"These are the {variant} images of {entry.title}.")
    return tree.reader, listings, notes


def _in_zip(path: Path, entry: Entry) -> ZipTree:
    """The dataset in a zip: the one folder that holds it, in the zip or in a zip in it."""
    open_zip.cache_clear()  # the file may have been replaced since this process last read it
    assert entry.layout is not None
    tree = ZipTree(path)
    found = _datasets(tree, entry, path.stem)
    files = [f"{folder}/{file}" if folder else file for folder, here in tree.folders.items() for file in here.files]
    inner = [file for file in sorted(files) if file.lower().endswith(".zip") and "/._" not in f"/{file}"]
    stems = {member: Path(member).stem for member in inner}
    usual = [member for member in inner if entry.is_usual(stems[member])]
    for member in [] if found else usual or inner:
        found += _datasets(ZipTree(path, member), entry, stems[member])
    if len(found) == 1:
        return found[0]
    official = list(entry.layout.official.values())
    names = ", ".join(f"{tree.member}/{tree.inside}" if tree.member else tree.inside for tree in found)
    what = f"several datasets ({names})" if found else f"no folder {official[0]}"
    raise UserError(
        f"The zip {path} holds {what}; expected one dataset with the folders {', '.join(official)}: "
        "get the official zip, or unpack this one and set config.data.root to the folder inside."
    )


def _datasets(tree: ZipTree, entry: Entry, stem: str) -> list[ZipTree]:
    """The folders of a zip called `stem` that hold the dataset; of several those with a usual name, if any."""
    assert entry.layout is not None
    folders = {path: entry.is_usual(path.rpartition("/")[2] or stem) for path in sorted(tree.folders)}
    found = [path for path, usual in folders.items() if _holds(tree.at(path), entry.layout, usual)]
    if len(found) > 1:
        found = [path for path in found if folders[path]] or found
    return [tree.at(path) for path in found]


def _by_names(tree: Tree, layout: Layout, found: dict[str, str]) -> tuple[dict[str, Listing], list[str]]:
    """The splits of a layout whose images are named by their identity."""
    optional = _split_folders(tree, layout.optional.items())
    listings = {split: _listing(tree, folder, layout) for split, folder in (found | optional).items()}
    notes = []
    for name in layout.unused:
        if folder := _find(tree, name):
            images = sum(_is_image(file) for file in below(tree, folder, layout.depth)[0])
            plural = "s" * (images != 1)
            notes.append(f"Left out {folder} ({images:,} image{plural}), which the protocol does not use.")
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
        held = f"no image among {len(ignored):,} file{'s' * (len(ignored) > 1)}" if ignored else "no file"
        raise UserError(
            f"{tree.where} has {held} in {folder}; expected images named {layout.example}: "
            "complete it from the official archive."
        )
    if len(others) > len(kept) + len(unusable):
        raise UserError(
            f"{tree.where} has {len(others):,} of {len(others) + len(kept) + len(unusable):,} images in {folder} that "
            f"are not named {layout.example}: {printable(([k[0] for k in kept] + unusable)[0])} is, "
            f"{printable(others[0])} is not; {_RENAME}."
        )
    _check_folders(tree, kept)
    names, identity, *camera = zip(*kept, strict=True) if kept else ((), ())
    cameras = np.array(camera[0], np.int32) if camera else None
    return Listing(tuple(names), np.array(identity, np.int32), cameras, tuple(ignored), tuple(unusable))


def _check_folders(tree: Tree, kept: list[tuple]) -> None:
    """Refuses folders of identities, called by numbers, that contradict the numbers in the names of their images."""
    of_folder: dict[int, tuple[int, str]] = {}
    of_number: dict[int, tuple[int, str]] = {}
    for name, number, *_ in kept:
        folder = name.split("/")[-2]
        if re.fullmatch(r"[0-9]{1,9}", folder):
            one = of_folder.setdefault(int(folder), (number, name))
            other = of_number.setdefault(number, (int(folder), name))
            if one[0] != number or other[0] != int(folder):
                first = printable(one[1] if one[0] != number else other[1])
                raise UserError(
                    f"{tree.where} has {first} and {printable(name)}, whose folders and names tell different "
                    f"identities; expected the identity in front of each name: {_RENAME}."
                )


def _by_lists(tree: Tree, layout: Layout, found: dict[str, str]) -> tuple[dict[str, Listing], list[str]]:
    """The splits of MSMT17's layout. Training and test identities are both counted from 0 in the lists: here the
    training identities go from 1 on, and the test identities on from there."""
    listings, notes = {}, []
    files = {folder: set(below(tree, folder, layout.depth)[0]) for folder in set(found.values())}
    listed: dict[str, set[str]] = {folder: set() for folder in files}
    first = 1
    for split, folder in found.items():
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
            notes.append(f"Left out {len(unlisted):,} images of {folder} that no list names: {some(unlisted)}.")
    return listings, notes


def _rows(tree: Tree, name: str, layout: Layout) -> Iterator[tuple[str, int, int]]:
    """The path, the identity and the camera in each line of a list."""
    for line, text in enumerate(tree.read(name).decode("utf-8", "surrogateescape").splitlines(), 1):
        if not text.strip():
            continue
        image, _, identity = text.strip().replace("\\", "/").rpartition(" ")
        camera = layout.name.match(_base(image))
        if not identity.isdecimal() or not camera:
            raise UserError(
                f"Line {line} of {name} ({tree.where[0].lower()}{tree.where[1:]}) is {printable(text.strip())!r}, "
                f"expected a path and an identity, the image named {layout.example}."
            )
        yield image.strip(), int(identity), int(camera[1])


def _by_folders(tree: Tree, layout: Layout, found: dict[str, str]) -> tuple[dict[str, Listing], list[str]]:
    """The splits of a layout with a folder for each identity, which may be called by any text."""
    contents = {}
    for split, folder in found.items():
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
        names = [f"{found[split]}/{name}" for split in ("query", "gallery") for name in contents[split][0]]
        raise UserError(
            f"{tree.where} has images with a camera in their names, such as {printable(names[_first(tests, True)])}, "
            f"and others without, such as {printable(names[_first(tests, False)])}: {_RENAME}."
        )
    listings = {}
    for split, (images, ignored, unusable) in contents.items():
        folder = found[split]
        listings[split] = Listing(
            tuple(f"{folder}/{name}" for name in images),
            np.array([numbers[name.partition("/")[0]] for name in images], np.int32),
            np.array([int(m[1]) for m in cameras[split] if m], np.int32) if all(cameras[split]) else None,
            tuple(f"{folder}/{name}" for name in ignored),
            tuple(f"{folder}/{name}" for name in unusable),
        )
    return listings, []


def _first(values: list, true: bool) -> int:
    return [bool(value) for value in values].index(true)


def list_distractors(path: Path) -> tuple[Reader, Listing]:
    """The images of a folder or a zip of distractors, all of identity 0; camera 0 where names have none.

    Raises:
      UserError: if there are none, or if one is named as an image of a person.
    """
    tree = ZipTree(path) if path.is_file() else FolderTree(path)
    files, broken = below(tree, "", 99)
    names = sorted(filter(_is_image, files))
    unusable = sorted(filter(_is_image, broken))
    if not names and not unusable:
        raise UserError(f"{path} (config.data.distractors) holds no image.")
    layout = DATASETS["market1501"].layout
    assert layout is not None
    matches = [layout.name.match(_base(name)) for name in names]
    for name, match in zip(names, matches, strict=True):
        if match and int(match[1]) > 0:
            raise UserError(
                f"{path} (config.data.distractors) holds {printable(name)}, an image of a person by its name: expected "
                "distractors alone."
            )
    camera = np.array([int(match[2]) if match else 0 for match in matches], np.int32)
    return tree.reader, Listing(tuple(names), np.zeros(len(names), np.int32), camera, (), tuple(unusable))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _base(name).startswith(".")
