"""The table of datasets: layout on disk, official counts, evaluation protocol and source.

To add a dataset, add an entry to `DATASETS` and a test. The readers (`vpm_jax.data.folders`), the checks of counts,
`data.name`, `--dataset` and the table in docs/data.md follow from it.

    python -m vpm_jax.data.datasets

prints the table of docs/data.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

_MARKET_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,9})(?!\d)")
_NUMBER = re.compile(r"(\d{1,9})(?![0-9A-Za-z])")


@dataclass(frozen=True)
class Layout:
    """The folders of a dataset and the names of its images."""

    # {split: names of its folder, the official one first}; case does not matter.
    folders: Mapping[str, tuple[str, ...]]
    # Where identities come from. "names": the start of an image's name; "folders": the name of its folder; "lists":
    # list_SPLIT.txt, whose lines hold a path below the split's folder and an identity.
    identity: str = "names"
    name: re.Pattern[str] = _MARKET_NAME  # matches the start of an image's name: identity and camera, if any
    example: str = "IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg"  # for error messages
    depth: int = 0  # how deep images may be nested below the split's folder
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # like `folders`; may be missing
    unused: tuple[str, ...] = ()  # folders that belong to no split
    foreign: tuple[str, ...] = ()  # folders that only another dataset has
    variants: tuple[str, ...] = ()  # folder names of the variants of the dataset, of which one is evaluated

    @property
    def official(self) -> dict[str, str]:
        """{split: official name of its folder}."""
        return {split: names[0] for split, names in self.folders.items()}


@dataclass(frozen=True)
class Protocol:
    """How a dataset is evaluated."""

    # "drop": gallery images with the query's identity and camera are not ranked for it; "none": there are no cameras.
    same_camera: str = "none"
    # "whole": whole people, cropped to each of eval.gammas; "partial": partial or occluded images, used as they are.
    queries: str = "whole"
    # "all": against all gallery images; "single": against one gallery image per identity, averaged over all groups of
    # queries and gallery images (vpm_jax.partial).
    shots: tuple[str, ...] = ("all",)
    ranks: tuple[int, ...] = (1, 5, 10)
    mAP: bool = True

    def __str__(self) -> str:
        scores = [*(f"R-{k}" for k in self.ranks), *(["mAP"] if self.mAP else [])]
        camera = "same camera dropped" if self.same_camera == "drop" else "no cameras"
        return f"{' and '.join(f'{shot}-shot' for shot in self.shots)}, {camera}; {', '.join(scores)}"


@dataclass(frozen=True)
class Entry:
    """A dataset."""

    name: str  # in data.name and --dataset
    title: str
    usual: str  # regular expression for usual names of a copy, in lower case without punctuation
    layout: Layout | None  # None: a CSV
    # The official (images, identities above 0) of each split, one mapping per variant.
    counts: tuple[Mapping[str, tuple[int, int]], ...] = ()
    protocol: Protocol = Protocol()
    paper: str = ""
    compared: str = ""  # queries and gallery, in words
    distractors: bool = False  # identity 0 means distractor, unless data.identity_zero says otherwise
    own: bool = False  # the user's own images, which are rotated by their EXIF orientation

    @property
    def trains(self) -> bool:
        return self.layout is None or "train" in self.layout.folders

    def is_usual(self, file_name: str) -> bool:
        """Whether this is a usual name for a copy of the dataset, such as Market-1501-v15.09.15."""
        return re.fullmatch(self.usual, re.sub(r"[^a-z0-9]", "", file_name.lower())) is not None

    def official(self, split: str) -> list[tuple[int, int]]:
        """The official (images, identities) of a split, without duplicates between variants."""
        return list(dict.fromkeys(counts[split] for counts in self.counts if split in counts))


_MARKET = Layout({"train": ("bounding_box_train",), "query": ("query",), "gallery": ("bounding_box_test",)})
_PARTIAL_REID = Layout(
    {"query": ("partial_body_images", "query"), "gallery": ("whole_body_images", "gallery")},
    name=_NUMBER,
    example="IDENTITY_NUMBER, such as 001_001.jpg",
    depth=1,
    unused=("occluded_body_images",),
)
_PARTIAL_ILIDS = Layout(
    {"query": ("Probe", "query"), "gallery": ("Gallery",)},
    name=_NUMBER,
    example="IDENTITY, such as 001.jpg",
    depth=1,
    unused=("partial_iLIDS_Probe_nocrop",),
)
_CROSS_CAMERA = Protocol("drop")
_CONTAINER = "icme2018.*"  # Occluded-REID and P-DukeMTMC are distributed in one folder

DATASETS = {
    entry.name: entry
    for entry in (
        Entry(
            "market1501",
            "Market-1501",
            "market(1501.*)?",
            replace(_MARKET, optional={"multi_query": ("gt_bbox",)}),
            ({"train": (12936, 751), "query": (3368, 750), "gallery": (19732, 750)},),
            _CROSS_CAMERA,
            "Zheng et al., ICCV 2015",
            "query against bounding_box_test",
            distractors=True,
        ),
        Entry(
            "dukemtmc",
            "DukeMTMC-reID",
            "duke(mtmc(reid.*)?)?",
            _MARKET,
            ({"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},),
            _CROSS_CAMERA,
            "Zheng et al., ICCV 2017",
            "query against bounding_box_test",
            distractors=True,
        ),
        Entry(
            "synthetic",
            "synthetic pedestrians",
            "synthetic",
            _MARKET,
            protocol=_CROSS_CAMERA,
            compared="query against bounding_box_test",
            distractors=True,
        ),
        Entry(
            "msmt17",
            "MSMT17",
            "msmt(17.*)?",
            Layout(
                {
                    "train": ("train", "mask_train_v2"),
                    "query": ("test", "mask_test_v2"),
                    "gallery": ("test", "mask_test_v2"),
                },
                "lists",
                re.compile(r"\d+_\d+_(\d{1,9})(?!\d)"),
                "IDENTITY_NUMBER_CAMERA_..., such as 0000_000_01_0303morning_0015_0.jpg",
                depth=1,
            ),
            ({"train": (32621, 1041), "query": (11659, 3060), "gallery": (82161, 3060)},),
            _CROSS_CAMERA,
            "Wei et al., CVPR 2018",
            "list_query against list_gallery; training on list_train and list_val",
        ),
        Entry(
            "cuhk03_np",
            "CUHK03-NP",
            "cuhk03(np)?(labeled|detected)?|labeled|detected",
            replace(_MARKET, variants=("labeled", "detected")),
            (
                {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
                {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
            ),
            _CROSS_CAMERA,
            "Zhong et al., CVPR 2017",
            "query against bounding_box_test, of labeled or of detected",
            distractors=True,
        ),
        Entry(
            "occluded_dukemtmc",
            "Occluded-DukeMTMC",
            "occludedduke(mtmc(reid)?(dataset)?)?",
            _MARKET,
            ({"train": (15618, 702), "query": (2210, 519), "gallery": (17661, 1110)},),
            replace(_CROSS_CAMERA, queries="partial"),
            "Miao et al., ICCV 2019",
            "query (occluded) against bounding_box_test",
            distractors=True,
        ),
        Entry(
            "p_dukemtmc",
            "P-DukeMTMC-reID",
            f"pduke(mtmc(reid)?)?|{_CONTAINER}",
            Layout(
                {"train": ("train",), "query": ("test/occluded_body_images",), "gallery": ("test/whole_body_images",)},
                name=_NUMBER,
                example="IDENTITY_..., such as 0001_1_0046985.jpg",
                depth=2,
            ),
            ({"train": (12927, 665), "query": (2163, 634), "gallery": (9053, 634)},),
            Protocol(queries="partial"),
            "Zhuo et al., ICME 2018",
            "test/occluded_body_images against test/whole_body_images",
        ),
        Entry(
            "occluded_reid",
            "Occluded-REID",
            f"occlude(d)?reid(dataset)?|{_CONTAINER}",
            replace(
                _PARTIAL_REID,
                folders={"query": ("occluded_body_images", "query"), "gallery": ("whole_body_images", "gallery")},
                example="IDENTITY_NUMBER, such as 001_01.tif",
                unused=(),
                foreign=("partial_body_images",),
            ),
            ({"query": (1000, 200), "gallery": (1000, 200)},),
            Protocol(queries="partial"),
            "Zhuo et al., ICME 2018",
            "occluded_body_images against whole_body_images",
        ),
        Entry(
            "partial_reid",
            "Partial-REID",
            "partial(person)?reid(dataset)?|dataset2",
            _PARTIAL_REID,
            ({"query": (300, 60), "gallery": (300, 60)},),
            Protocol(queries="partial", shots=("all", "single"), ranks=(1, 3, 5)),
            "Zheng et al., ICCV 2015",
            "partial_body_images against whole_body_images",
        ),
        Entry(
            "partial_reid_occluded",
            "Partial-REID (occluded)",
            "partial(person)?reid(dataset)?|dataset2",
            replace(
                _PARTIAL_REID,
                folders={"query": ("occluded_body_images",), "gallery": ("whole_body_images",)},
                unused=("partial_body_images",),
            ),
            ({"query": (300, 60), "gallery": (300, 60)},),
            Protocol(queries="partial", shots=("all", "single"), ranks=(1, 3, 5)),
            "Zheng et al., ICCV 2015",
            "occluded_body_images against whole_body_images",
        ),
        Entry(
            "partial_ilids",
            "Partial-iLIDS",
            "partialilids(dataset)?|dataset2",
            _PARTIAL_ILIDS,
            ({"query": (119, 119), "gallery": (119, 119)},),
            Protocol(queries="partial", shots=("single",), ranks=(1, 3, 5), mAP=False),
            "Zheng et al., CVPR 2011",
            "Probe against Gallery",
        ),
        Entry(
            "partial_ilids_nocrop",
            "Partial-iLIDS (not cropped)",
            "partialilids(dataset)?|dataset2",
            replace(
                _PARTIAL_ILIDS,
                folders={"query": ("partial_iLIDS_Probe_nocrop",), "gallery": ("Gallery",)},
                unused=("Probe",),
            ),
            ({"query": (119, 119), "gallery": (119, 119)},),
            Protocol(queries="partial", shots=("single",), ranks=(1, 3, 5), mAP=False),
            "Zheng et al., CVPR 2011",
            "partial_iLIDS_Probe_nocrop against Gallery",
        ),
        Entry(
            "identity_folders",
            "own folders of identities",
            "identityfolders",
            Layout(
                {"train": ("train",), "query": ("query",), "gallery": ("gallery",)},
                "folders",
                re.compile(r"(?:.*[^0-9A-Za-z])?c(\d{1,9})(?:s\d+)?(?![0-9A-Za-z])"),
                "SPLIT/IDENTITY/IMAGE, such as query/anna/1_c2s1.jpg",
                depth=1,
            ),
            protocol=_CROSS_CAMERA,
            compared="query against gallery; same camera dropped if names have cameras",
            own=True,
        ),
        Entry(
            "csv",
            "own images",
            "csv",
            None,
            protocol=_CROSS_CAMERA,
            compared="query rows against gallery rows; same camera dropped if there is a column",
            own=True,
        ),
    )
}
TITLES = {name: entry.title for name, entry in DATASETS.items()}


def further_sets(also_train: str) -> list[tuple[str, str]]:
    """(name, path) of each set in config.data.also_train; the path is "" if it is not given."""
    parts = (item.strip().partition(":") for item in also_train.split(",") if item.strip())
    return [(name, path) for name, _, path in parts]


def table(entries: Iterable[Entry] = DATASETS.values()) -> str:
    """The datasets as a Markdown table."""
    lines = [
        "| name | dataset | training images (identities) | query | gallery | compared | protocol |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for entry in entries:
        title = f"{entry.title}, {entry.paper}" if entry.paper else entry.title
        counts = [
            " or ".join(f"{images:,} ({identities:,})" for images, identities in entry.official(split)) or "–"
            for split in ("train", "query", "gallery")
        ]
        lines.append(f"| `{entry.name}` | {title} | {' | '.join(counts)} | {entry.compared} | {entry.protocol} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
