"""ArrayRecord holds the same dataset, bytes and all; a killed or failed run leaves nothing that would be read."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from market_files import config, content, fails, make_folder, make_zip
from paths import PYTHON_PATH
from PIL import Image
from raising import raises

from vpm_jax.data import arrayrecord
from vpm_jax.data.sources import load_dataset
from vpm_jax.errors import UserError
from vpm_jax.prepare import main


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "images")


@pytest.fixture
def prepared(folder, tmp_path) -> Path:
    return arrayrecord.write(load_dataset(config(folder)), tmp_path / "out")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_prepared_equals_source(folder, tmp_path, form, capsys):
    source = folder if form == "folder" else make_zip(folder, tmp_path / "market.zip")
    output = tmp_path / "out"
    main(["market1501", "--source", str(source), "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"Prepared {output / 'market1501' / '1.0.0'}" in printed
    assert "9 training, 2 query and 4 gallery images" in printed and "Unknown size" not in printed
    expected = content(load_dataset(config(folder)))
    for root in (output, output / "market1501", output / "market1501" / "1.0.0"):
        data = load_dataset(config(root))
        assert content(data) == expected
    assert any("Ignored" in note and "Thumbs.db" in note for note in data.notes)
    assert any("not the official one" in note for note in data.notes)
    assert sum("not the official one: it has 9" in note for note in data.notes) == 1
    held, plain = (load_dataset(config(root, holdout=2)) for root in (output, folder))
    assert content(held) == content(plain)  # the held-out query comes from the training records
    assert sorted(p.name for p in output.iterdir()) == ["market1501"]  # no folder for downloads


def test_images_that_cannot_be_decoded_are_kept_and_named(folder, tmp_path, capsys):
    image = min((folder / "query").glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:-20])
    main(["market1501", "--source", str(folder), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert f"warning: query/{image.name} is a damaged JPEG" in said
    assert "warning: images that cannot be decoded, copied unchanged: 1." in said
    assert content(load_dataset(config(tmp_path / "out"))) == content(load_dataset(config(folder)))


def test_tfds_reads_it_without_tensorflow(prepared):
    code = (
        "import sys, tensorflow_datasets as tfds; "
        f"s = tfds.builder_from_directory({str(prepared)!r}).as_data_source(split='train'); "
        "x = s[0]; print(len(s), x['identity'], x['camera'], x['image'].shape, x['name'].decode()); "
        "print('tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "9 2 1 (8, 4, 3) bounding_box_train/0002_c1s1_000001_00.jpg\nFalse\n"


def test_other_images_are_not_taken_for_prepared_ones(tmp_path, capsys):
    output = str(tmp_path / "out")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for image, colour in (("a.png", 9), ("b.png", 99), ("c.png", 199)):
            shade = colour + (name == "two" and image == "a.png")
            Image.new("RGB", (8, 16), (shade, 0, 0)).save(tmp_path / name / image)
        rows = "path,identity,split\na.png,1,train\nb.png,1,query\nc.png,1,gallery\n"
        (tmp_path / name / "own.csv").write_text(rows)
    main(["csv", "--source", str(tmp_path / "one"), "--output", output])
    main(["csv", "--source", str(tmp_path / "one" / "own.csv"), "--output", output])
    assert "Already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prepared from other images .* choose another --output"):
        main(["csv", "--source", str(tmp_path / "two"), "--output", output])  # the same names, another picture
    with (tmp_path / "one" / "own.csv").open("a") as file:
        file.write("b.png,2,query\n".replace("b.png", "../two/b.png"))
    with pytest.raises(UserError, match="1 query and 1 gallery images"):
        main(["csv", "--source", str(tmp_path / "one"), "--output", output])


def test_already_prepared(prepared, folder, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    main(["market1501", "--source", "nowhere", "--output", str(prepared.parent.parent)])
    out = capsys.readouterr().out
    assert out.startswith("Already prepared") and str(prepared) in out and "9 training" in out
    monkeypatch.setenv("HOME", str(folder.parent))
    main(["market1501", "--source=~/images", "--output", str(prepared.parent.parent)])
    assert "the same images as ~/images" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == before


def test_damaged(prepared):
    def each(path: Path, data: bytes, *parts: str):
        whole = path.read_bytes()
        path.write_bytes(data)
        fails(config(prepared), *parts, "python -m vpm_jax.prepare")
        path.write_bytes(whole)

    for split in ("train", "query", "gallery"):
        [records] = prepared.glob(f"*-{split}.array_record*")
        whole = records.read_bytes()
        each(records, b"", "cannot be read")
        each(records, whole[: len(whole) // 2], "cannot be read")
        each(records, os.urandom(len(whole)), "cannot be read")
    each(prepared / "dataset_info.json", b"{", "is damaged")
    each(prepared / "index.json", b"{", "is damaged")
    each(prepared / "index.json", b'{"notes": []}', "is damaged")
    index, info = ((prepared / name).read_bytes() for name in ("index.json", "dataset_info.json"))
    older = index.replace(b'"checksum"', b'"other"')  # as before there was a checksum
    for before, after, part in (
        (b"0030_c6s1_000002", b"0030_c6s1_000009", "the record is that of"),
        (b'"notes"', b'"other"', "is damaged"),
        (b'"notes": [', b'"notes": null, "other": [', "is damaged"),
    ):
        assert before in older
        each(prepared / "index.json", older.replace(before, after), part)
    for before, after in ((b"30, 30]", b"30, 0]"), (b"6, 6]", b"6, 5]")):
        assert before in index
        each(prepared / "index.json", index.replace(before, after), "the checksum of index.json differs")
    more = json.loads(info)
    more["splits"].append(more["splits"][0] | {"name": "multi_query"})
    each(prepared / "dataset_info.json", json.dumps(more).encode(), "index.json lacks multi_query")
    load_dataset(config(prepared))  # whole again


def test_another_dataset(prepared):
    fails(config(prepared, "dukemtmc"), "contains market1501, but config.data.name is dukemtmc")


def test_synthetic_is_read_where_the_root_names_it(folder, tmp_path):
    main(["synthetic", "--source", str(folder), "--output", str(tmp_path / "out")])
    for root in (tmp_path / "out" / "synthetic", tmp_path / "out" / "synthetic" / "1.0.0"):
        assert content(load_dataset(config(root, "synthetic"))) == content(load_dataset(config(folder)))
    # Above it the configuration's parameters count, which the prepared one need not have.
    data = config(tmp_path / "out", "synthetic")
    data.synthetic.update(train_identities=3, test_identities=2, cameras=2)
    assert load_dataset(data).train.num_identities == 3


def test_wrong_command_lines(tmp_path):
    with pytest.raises(UserError, match=r"'cuhk03'.*market1501, dukemtmc, synthetic"):
        main(["cuhk03"])
    with pytest.raises(UserError, match="does not exist"):
        main(["market1501", "--source", str(tmp_path / "nowhere"), "--output", str(tmp_path)])
    make_folder(tmp_path / "images")
    (tmp_path / "file").write_text("")
    with raises("bad-output"):
        main(["market1501", "--source", str(tmp_path / "images"), "--output", str(tmp_path / "file")])


def test_a_bad_image_leaves_nothing(folder, tmp_path):
    path = make_zip(folder, tmp_path / "market.zip")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("Market-1501-v15.09.15/query/0003_c2s1_000001_00.jpg").header_offset
    damaged = bytearray(path.read_bytes())
    damaged[start + 120 : start + 400] = bytes(280)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"query/0003_c2s1_000001_00\.jpg in the zip .* cannot be read"):
        main(["market1501", "--source", str(path), "--output", str(tmp_path / "out")])
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_full_disk_is_one_sentence(folder, tmp_path):
    code = (
        "import resource, sys; from market_files import config, load_dataset; from vpm_jax.data import arrayrecord\n"
        f"data = load_dataset(config({str(folder)!r}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from pathlib import Path; from vpm_jax.errors import UserError\n"
        f"try: arrayrecord.write(data, Path({str(tmp_path / 'out')!r}))\n"
        "except UserError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert "could not be written" in out and "raise the limit" in out and "Errno" not in out and out.count("\n") == 1
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_killed_run_leaves_nothing_to_read(folder, tmp_path, capsys):
    code = (
        "import time; from pathlib import Path; from market_files import config, load_dataset\n"
        "from vpm_jax.data import arrayrecord\n"
        "def stall(images, name):\n"
        "    yield from images\n"
        "    if name == 'gallery': print('stalled', flush=True), time.sleep(60)\n"
        f"arrayrecord.write(load_dataset(config({str(folder)!r})), Path({str(tmp_path / 'out')!r}), stall)\n"
    )
    env = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").rglob("*-query.array_record*")):  # train and query lie written
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    fails(config(tmp_path / "out"), "contains no Market-1501")
    main(["market1501", "--source", str(folder), "--output", str(tmp_path / "out")])
    assert "is left over from a killed process" in capsys.readouterr().out
    assert content(load_dataset(config(tmp_path / "out"))) == content(load_dataset(config(folder)))
