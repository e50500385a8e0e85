"""A gallery on disk, to add images to and to search: what python -m vpm_jax.search does, from Python.

gallery = Gallery.open("store", "runs/synthetic")
gallery.add(["a.jpg", "b.jpg"])
for ranking in gallery.query(["partial.jpg"], k=5):
    print([(result.name, result.distance) for result in ranking.results])
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpm_jax import config as config_lib
from vpm_jax.api import VPM, Places, located
from vpm_jax.description import Description, route
from vpm_jax.errors import UserError, check_count
from vpm_jax.images import Image, Images, each
from vpm_jax.matching import nearest, pairwise_shares
from vpm_jax.progress import Progress
from vpm_jax.reduction import Reduction
from vpm_jax.regions import UNCUT, GalleryCrop, gallery_crops, visible_heights
from vpm_jax.search import reduced
from vpm_jax.search.folder import Skip, describe, list_images, report
from vpm_jax.search.ranking import Ranking, Result
from vpm_jax.search.reduced import Reduced
from vpm_jax.search.store import About, Entry, Store, Writer
from vpm_jax.thresholds import Thresholds

_COMMIT_SECONDS = 5.0  # the most work that a kill loses


class Update(NamedTuple):
    """What changed in a gallery, in images."""

    new: int
    changed: int
    deleted: int
    unreadable: int
    lost: int = 0  # became unreadable before all crops were described
    others: int = 0  # files of the folder that are not images


class Gallery:
    """Described images in a feature store, opened by `Gallery.open`.

    Attributes:
      folder: the folder of the store.
      model: describes images.
      store: the images, as of opening or this object's last write; None without a store.
      candidates: queries are compared with this many images only, those nearest by the features that `reduce` stored:
        fast for large galleries, and almost exact (docs/results/vectors.md). None: with all images.
    """

    def __init__(
        self, folder: Path, model: VPM, store: Store | None, model_path: str, crops: list[GalleryCrop], dtype: str
    ):
        self.folder, self.model, self.store = folder, model, store
        self.candidates: int | None = None
        self._model_path, self._crops, self._dtype = model_path, crops, dtype
        self._verified: dict[GalleryCrop, Store] = {}
        self._reduced: dict[GalleryCrop, Reduced] = {}

    @classmethod
    def open(
        cls,
        store: str | os.PathLike[str],
        model: VPM | str | os.PathLike[str] | None = None,
        crops: Iterable[float] | None = None,
        dtype: str = "float16",
        candidates: int | None = None,
    ) -> Gallery:
        """Opens a feature store, or a new one, which the first write creates.

        Args:
          store: its folder.
          model: a model or what `VPM.load` takes (default: the one that the store records).
          crops: of a new store: gammas of the crops to describe beside whole images; each query is compared with the
            crop closest to what it shows (default: the model's match.gallery_gammas).
          dtype: of a new store: "float16" or "float32".
          candidates: see `Gallery`.

        Raises:
          UserError: for a store that is missing (without `model`), damaged or of another model, and as `VPM.load`.
        """
        folder = Path(os.path.expanduser(store))
        opened = Store(folder) if model is None or (folder / "store.json").exists() else None
        recorded = opened.path("model") if opened is not None else None
        model = model if model is not None else recorded
        if model is None:
            raise UserError(f"{folder} records no model: give the workdir of a training run, or an exported file.")
        if not isinstance(model, VPM):
            path = located(model)  # the target of a link to a file may lack the suffix
            recorded = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
            model = VPM.load(recorded)
        if opened is not None:
            opened.check_model(model.fingerprint, model.source)
        known = _crops(model, crops) if opened is None or "parts" not in opened.about.extra else [*stored_crops(opened)]
        gallery = cls(folder, model, opened, str(recorded or ""), known, opened.about.dtype if opened else dtype)
        gallery.candidates = candidates
        return gallery

    def __len__(self) -> int:
        return 0 if self.store is None else len(self.store)

    def __repr__(self) -> str:
        return f"Gallery({self.folder}: {len(self)} images, described by {self.model})"

    # ---- Writing ----

    def add(self, images: Images, names: Iterable[str] | None = None, batch: int = 64) -> Update:
        """Adds images; one of the same name is replaced if it differs, and removed if the new one cannot be read.

        Args:
          images: as for `VPM.features`.
          names: one for each image. Default: paths, relative to the folder that `index` read if they are in it,
            otherwise absolute; other images need names.
          batch: images per batch.

        Raises:
          UserError: for names that are missing or not unique, and for images that cannot be read, after all others are
            added. Also as `search.store.Writer`.
        """
        items = list(each(images))
        called = [None] * len(items) if names is None else list(names)
        if len(called) != len(items):
            raise UserError(f"There are {len(called)} names for {len(items)} images: give one for each.")
        self._refresh()
        entries = [self._entry(*item) for item in enumerate(zip(items, called, strict=True))]
        given = {entry.name: image for entry, image in zip(entries, items, strict=True)}
        if len(given) < len(items):
            raise UserError(f"{len(items)} images have {len(given)} different names: give each its own.")
        errors: list[UserError] = []
        update = self._write(entries, lambda entry: True, self._root, given, batch, errors.append)
        if errors:
            sentence = f"{len(errors)} of {len(items)} images could not be added: {errors[0]}"
            raise UserError(sentence, code=errors[0].code)
        return update

    def index(self, folder: str | os.PathLike[str], crops: Iterable[float] | None = None, batch: int = 64) -> Update:
        """Makes the gallery hold the images under `folder`, at any depth, and those that `add` named or found
        elsewhere. Describes only new and changed files. Prints progress, and what cannot be read to stderr.

        Args:
          folder: the images (see `search.folder.list_images`).
          crops: gammas of the crops to describe (default: as before).
          batch: images per batch.

        Raises:
          UserError: for a folder without images, a gallery of another folder, crops that the model does not support,
            and as `search.store.Writer`.
        """
        folder = Path(os.path.expanduser(folder))
        images, others = list_images(folder)
        self._refresh()
        if self._root != Path() and self._root.is_dir() and not self._root.samefile(folder):  # it may have moved
            raise UserError(f"{self.folder} is the index of {self._root}: give that folder, or another --index.")

        root = folder.resolve()

        def keep(entry: Entry) -> bool:
            """Whether `add` named the image, or found it outside the folder."""
            return entry.size == 0 or (os.path.isabs(entry.name) and not Path(entry.name).is_relative_to(root))

        if crops is not None:
            self._crops = _crops(self.model, crops)
        update = self._write(images, keep, root, {}, batch, report, "images")
        return update._replace(others=others)

    @property
    def _root(self) -> Path:
        """The folder of relative names."""
        return (self.store.path("folder") if self.store is not None else None) or Path()

    def _entry(self, number: int, item: tuple[Image, str | None]) -> Entry:
        """The entry of an image to add and its name, if it was given one."""
        image, name = item
        if name is not None:
            if not isinstance(name, str):
                raise UserError(f"The name of image {number} is {name!r}, expected text.")
            return Entry(name, mtime_ns=time.time_ns())  # never that of an older image of this name
        if not isinstance(image, str | os.PathLike):
            raise UserError(f"image {number} is {type(image).__name__}, not a path: give names, one for each image.")
        path = Path(os.path.expanduser(image)).resolve()
        inside = self._root != Path() and path.is_relative_to(self._root)
        name = str(path.relative_to(self._root) if inside else path)
        try:
            status = path.stat()
        except OSError:  # reading it reports the error
            return Entry(name)
        return Entry(name, status.st_size, status.st_mtime_ns)

    def _write(
        self,
        images: list[Entry],
        keep: Callable[[Entry], bool],
        root: Path,
        given: Mapping[str, Image],
        batch: int,
        skip: Skip,
        title: str = "",
    ) -> Update:
        """Makes the store, and those of its crops, hold `images` and the other stored ones to `keep`.

        Images that are not `given` by name are files under `root`. `title` starts the progress lines.
        """
        _, regions, channels = self.model.features([]).features.shape

        def extra(complete: Collection[GalleryCrop] = ()) -> dict[str, Any]:
            saved = [[crop.side, crop.gamma, crop in complete] for crop in self._crops]
            return {"folder": str(root) if root != Path() else "", "model": self._model_path, "parts": saved}

        def update(writer: Writer, wanted: list[Entry], crop: GalleryCrop = UNCUT) -> Update:
            """Makes a store hold exactly the wanted images."""
            stored = {entry.name: entry for entry in Store(writer.folder).entries}
            current = {entry.name: entry for entry in wanted}
            fresh = [entry for entry in wanted if stored.get(entry.name) != entry]
            writer.keep(np.array([current.get(name) == entry for name, entry in stored.items()], bool))
            unreadable, committed = {entry.name for entry in fresh}, time.monotonic()
            progress = Progress(title if crop == UNCUT else f"{title} ({crop})", len(fresh)) if title else None
            described = describe(
                self.model, fresh, lambda name: given.get(name, root / name), batch, crop, skip, progress
            )
            for entries, description in described:
                writer.append(entries, description.features, description.visibility)
                unreadable.difference_update(entry.name for entry in entries)
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    writer.commit()
                    committed = time.monotonic()
            writer.commit()
            written = [entry.name for entry in fresh if entry.name not in unreadable]
            changed = sum(name in stored for name in written)
            deleted = len(stored.keys() - current.keys())
            return Update(len(written) - changed, changed, deleted, len(unreadable))

        digest = hashlib.sha256(config_lib.to_json(self.model.config).encode()).hexdigest()[:16]
        about = About(self.model.fingerprint, digest, regions, channels, self._dtype, extra())
        old_crops = stored_crops(self.store) if self.store is not None else {}
        with Writer(self.folder, about) as writer:
            for crop in old_crops.keys() - set(self._crops):
                shutil.rmtree(crop_folder(self.folder, crop), ignore_errors=True)
            names = {entry.name for entry in images}
            others = [entry for entry in Store(self.folder).entries if entry.name not in names and keep(entry)]
            total = update(writer, others + images)
            complete: list[GalleryCrop] = []
            for crop in self._crops:
                with Writer(crop_folder(self.folder, crop), about) as crop_writer:
                    lost = update(crop_writer, Store(self.folder).entries, crop).unreadable
                if not lost:
                    complete.append(crop)
                total = total._replace(lost=max(total.lost, lost))
                writer.about = dataclasses.replace(writer.about, extra=extra(complete))
                writer.commit()
        self._reopen()
        if self._reduction.exists():
            self._write_reduced(Reduction.load(self._reduction))
        return total

    def reduce(self, dimensions: int) -> None:
        """Also stores features reduced to `dimensions` numbers per image, for `candidates`; 0 removes them.

        The reduction is learned from the gallery (`Reduction.fit`). Later writes keep the features up to date.

        Raises:
          UserError: for an empty gallery, fewer dimensions than regions, and as `search.store.Writer`.
        """
        self._refresh()
        if self.store is None:
            raise UserError(f"{self.folder} holds no images yet: add images first.")
        reduction = Reduction.fit(self.store, dimensions, self.model.fingerprint) if dimensions else None
        for store in self._stores():
            reduced.remove(store)
        self._reduction.unlink(missing_ok=True)
        self._reopen()
        if reduction is not None:
            reduction.save(self._reduction)
            self._write_reduced(reduction)

    def _reopen(self) -> None:
        """Reads the store as it is now; another process may have written it since this gallery was opened."""
        self.store, self._verified, self._reduced = Store(self.folder), {}, {}
        self._dtype = self.store.about.dtype
        if "parts" in self.store.about.extra:
            self._crops = [*stored_crops(self.store)]

    def _refresh(self) -> None:
        """`_reopen`, if there is a store. Call it before writing, or what others wrote since is lost."""
        if (self.folder / "store.json").exists():
            self._reopen()

    def _write_reduced(self, reduction: Reduction) -> None:
        for store in self._stores():
            reduced.write(store, reduction)

    def _stores(self) -> list[Store]:
        """Of whole images and of every crop."""
        assert self.store is not None
        return [self.store, *(Store(crop_folder(self.folder, crop)) for crop in self._crops)]

    @property
    def _reduction(self) -> Path:
        return self.folder / "reduction.npz"

    # ---- Searching ----

    def query(
        self,
        images: Images,
        k: int = 20,
        max_distance: float | None = None,
        false_match_rate: float | None = None,
        thresholds: str | os.PathLike[str] | None = None,
        places: Places | None = None,
    ) -> list[Ranking]:
        """Ranks the k nearest images of the gallery for each query image, by Eq. 4, with the distance of each region.

        If the store has crops, each query is compared with the crop closest to it (`description.route`).

        Args:
          images: as for `VPM.features`.
          k: the number of results.
          max_distance: only nearer images are results.
          false_match_rate: instead of `max_distance`, the distance measured for this rate and for what the query shows.
          thresholds: a file that python -m vpm_jax.threshold wrote, for `false_match_rate` (default: thresholds.json in
            the model's workdir).
          places: as for `VPM.features`: which part of a person the images show, if that is known.

        Raises:
          UserError: for an image that cannot be read, an empty or damaged gallery, thresholds that do not apply, or
            `candidates` without reduced features.
        """
        check_count("k", k)
        if self.candidates is not None:
            check_count("candidates", self.candidates)
        if max_distance is not None and not (isinstance(max_distance, Real) and max_distance >= 0):
            raise UserError(f"max_distance is {max_distance!r}, expected a number of at least 0.")
        if max_distance is not None and false_match_rate is not None:
            raise UserError("max_distance and false_match_rate are both given: choose one.")
        if self.store is None or not len(self.store):
            raise UserError(f"{self.folder} holds no images yet: run python -m vpm_jax.search index.")
        items = list(each(images))
        placed = [places] * len(items) if places is None or isinstance(places, str) else list(places)
        with ThreadPoolExecutor(1) as pool:
            verified = pool.submit(self._stored, UNCUT)
            queries = self.model.features(items, places=placed)
            verified.result()
        limit = [np.inf if max_distance is None else float(max_distance)] * len(items)
        if false_match_rate is not None:
            limit = self._limits(queries, thresholds, false_match_rate)
        crops = [UNCUT, *(crop for crop, complete in stored_crops(self.store).items() if complete)]
        rankings: dict[int, Ranking] = {}
        for crop, rows in route(queries, crops, self.model.grid).items():
            found = self._nearest(crop, queries[rows], k)
            for row, results in zip(rows, self._results(self._stored(crop), queries[rows], found), strict=True):
                within = [result for result in results if result.distance < limit[row]]
                closest = min((result.distance for result in results), default=np.inf)
                image = items[row]
                name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {row}"
                about = crop, limit[row], closest, placed[row]
                rankings[int(row)] = Ranking(name, image, queries[row], within, *about)
        return [rankings[row] for row in range(len(items))]

    def _stored(self, crop: GalleryCrop) -> Store:
        """The store of a crop, verified once."""
        assert self.store is not None
        if crop not in self._verified:
            store = self.store if crop == UNCUT else Store(crop_folder(self.folder, crop))
            store.check_model(self.model.fingerprint, self.model.source)
            store.verify()
            self._verified[crop] = store
        return self._verified[crop]

    def _nearest(self, crop: GalleryCrop, queries: Description, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(distance, index) [Q, k] of the nearest images."""
        match, store = self.model.config.match, self._stored(crop)
        if self.candidates is None:
            return nearest(match, queries, store, k)
        if crop not in self._reduced:
            self._reduced[crop] = Reduced.of(store, self._reduction)
        return self._reduced[crop].nearest(match, queries, store, k, self.candidates)

    def _results(self, store: Store, queries: Description, found: tuple[np.ndarray, np.ndarray]) -> list[list[Result]]:
        root, match, entries, rankings = self._root, self.model.config.match, store.entries, []
        for query, distances, indices in zip(queries, *found, strict=True):
            index = indices[np.isfinite(distances)]
            gallery = Description(store.features[index], store.visibility[index])
            local, weight = pairwise_shares(match, query, gallery)
            results = []
            for rank, (i, visibility) in enumerate(zip(index, gallery.visibility, strict=True)):
                path = root / entries[i].name
                numbers = float(distances[rank]), local[0, rank], weight[0, rank], visibility
                results.append(Result(entries[i].name, path, *numbers, _has_changed(path, entries[i])))
            rankings.append(results)
        return rankings

    @property
    def thresholds_file(self) -> Path:
        """Where python -m vpm_jax.threshold writes for the model: beside an exported file, in any other's folder."""
        path = Path(self._model_path)
        return (path.parent if path.is_file() else path) / "thresholds.json"

    def thresholds(self, path: str | os.PathLike[str] | None = None) -> Thresholds:
        """The distances measured for false match rates, from a file (default: `thresholds_file`).

        Raises:
          UserError: if it is missing, damaged or of another model, and for a gallery with crops.
        """
        if self._crops:
            raise UserError(
                f"{self.folder} has crops, and thresholds are measured with whole images: use --max-distance, or an "
                "index without --crops."
            )
        file = self.thresholds_file if path is None else Path(os.path.expanduser(path))
        return Thresholds.read(file, self.model.fingerprint, self.model.config.match)

    def _limits(
        self, queries: Description, path: str | os.PathLike[str] | None, false_match_rate: float
    ) -> list[float]:
        """The thresholds of queries for a false match rate, by how much of a person each shows."""
        measured = self.thresholds(path)
        top, bottom = visible_heights(queries.region_maps, self.model.grid).T
        found = [measured.distance(gamma, false_match_rate) for gamma in bottom - top]
        if None in found:
            raise UserError(
                f"{path or self.thresholds_file} has too few pairs for a false match rate of {false_match_rate:g}: "
                "choose a larger rate, or measure on more images."
            )
        return [distance for distance in found if distance is not None]


def stored_crops(store: Store) -> dict[GalleryCrop, bool]:
    """The crops of a store beside whole images, and whether each is complete.

    Each crop has its own store in `crop_folder`. Raises UserError if store.json is damaged.
    """
    saved = store.about.extra.get("parts", [])
    try:
        crops = {GalleryCrop(str(side), float(gamma)): bool(complete) for side, gamma, complete in saved}
        _ = [crop.crop for crop in crops]  # raises for an unknown side
    except (TypeError, ValueError):
        raise UserError(
            f"{store.folder / 'store.json'} is damaged (parts are {saved!r}): create the store again in another folder."
        ) from None
    return crops


def crop_folder(store: Path, crop: GalleryCrop) -> Path:
    """The folder of a crop's store."""
    return store / str(crop).replace(" ", "-")


def _crops(model: VPM, gammas: Iterable[float] | None) -> list[GalleryCrop]:
    """The crops to describe beside whole images; by default those of the model."""
    config = model.config.copy_and_resolve_references()
    if gammas is not None:
        config.match.gallery_gammas = tuple(gammas)
    # Not used by a search.
    config.match.rerank, config.eval.multi_query, config.eval.crop = False, False, "none"
    config_lib.check(config)
    return gallery_crops(config_lib.sides(config), config.match.gallery_gammas)[1:]


def _has_changed(path: Path, entry: Entry) -> bool:
    """Whether the file differs from the indexed one in size or time; False for one that is missing."""
    try:
        status = path.stat()
    except OSError:
        return False
    return entry.size > 0 and (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime_ns)
