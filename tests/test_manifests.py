"""Prepared data is used only if every file is what its manifest says."""

import hashlib
import os
import re

import polars as pl
import pytest
import yaml

from workbench import manifests
from workbench.datasets.pairs import PairData, load_pairs
from workbench.errors import ManifestError, RunError
from workbench.manifests import (
    install,
    locate,
    manifest_names,
    problems,
    read_manifest,
    search_folders,
    verified_folder,
)


def described(path):
    """The entry of a file as it is."""
    table = pl.read_parquet(path)
    raw = path.read_bytes()
    return {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "size": len(raw),
        "rows": table.height,
        "columns": table.columns,
    }


@pytest.fixture
def card(tmp_path):
    """A small set in tmp_path/data/kites and what its manifest says, as YAML would give it."""
    folder = tmp_path / "data" / "kites"
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "valid", "test")):
        rows = [
            {
                "sentence1": f"kite {n}",
                "sentence2": f"drum {n + number}",
                "condition": asked,
                "label": float(label),
            }
            for n in range(8)
            for label, asked in enumerate(("The shape.", "The sound."))
        ]
        pl.DataFrame(rows).write_parquet(folder / f"{split}.parquet")
    return {
        "name": "kites",
        "title": "Kites and drums",
        "description": "Invented.",
        "licence": "CC0",
        "redistribute": True,
        "citation": "nobody",
        "intended_use": "tests",
        "prepared_by": "this test",
        "files": {path.name: described(path) for path in sorted(folder.iterdir())},
    }


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write manifests where they are looked for, and look for data in tmp_path only."""
    monkeypatch.setattr(manifests, "manifest_folder", lambda: tmp_path / "manifests")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "manifests").mkdir()

    def write(card):
        (tmp_path / "manifests" / "kites.yaml").write_text(yaml.safe_dump(card))
        return tmp_path / "data" / "kites"

    return write


def test_a_set_that_matches_is_found_and_read(card, publish):
    folder = publish(card)
    assert problems(read_manifest("kites"), folder) == []
    assert verified_folder("kites") == folder
    tables = load_pairs(PairData(source="manifest", name="kites"))
    assert {split: table.height for split, table in tables.items()} == {"train": 16, "valid": 16, "test": 16}


def test_a_wrong_hash_names_the_file_and_both_hashes(card, publish):
    actual = card["files"]["valid.parquet"]["sha256"]
    card["files"]["valid.parquet"]["sha256"] = "0" * 64
    publish(card)
    with pytest.raises(ManifestError, match=f"valid.parquet: changed; expected .*{'0' * 64}, got .*{actual}"):
        verified_folder("kites")


def test_one_flipped_bit_is_noticed(card, publish):
    folder = publish(card)
    raw = bytearray((folder / "test.parquet").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "test.parquet").write_bytes(raw)
    with pytest.raises(
        ManifestError, match="kites does not match its manifest: .*test.parquet: changed; expected"
    ):
        load_pairs(PairData(source="manifest", name="kites"))


def test_a_file_cut_short_gives_both_sizes(card, publish):
    folder = publish(card)
    raw = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(raw[:-10])
    with pytest.raises(
        ManifestError,
        match=rf"train.parquet: cut short or changed; expected {len(raw)} .*got {len(raw) - 10} ",
    ):
        verified_folder("kites")


def test_a_wrong_row_count_gives_both_numbers(card, publish):
    card["files"]["test.parquet"]["rows"] = 17
    assert problems(read_manifest_of(card, publish), publish(card)) == [
        f"{publish(card) / 'test.parquet'}: 16 rows, the manifest says 17"
    ]


def read_manifest_of(card, publish):
    publish(card)
    return read_manifest("kites")


def test_wrong_columns_are_listed_beside_the_right_ones(card, publish):
    card["files"]["test.parquet"]["columns"] = ["label", "sentence1"]
    publish(card)
    with pytest.raises(
        ManifestError, match=r"test.parquet: columns \('sentence1', .* says \('label', 'sentence1'\)"
    ):
        verified_folder("kites")


def with_weights(card, publish, content=b"weights"):
    """Add a file that is no table to the set and its manifest."""
    (publish(card) / "weights.npz").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    return {**card, "files": {**card["files"], "weights.npz": entry}}


def test_a_file_that_is_no_table_is_checked_by_its_hash_alone(card, publish, tmp_path, monkeypatch):
    card = with_weights(card, publish)
    folder = publish(card)
    assert read_manifest("kites").files["weights.npz"].rows is None
    assert verified_folder("kites") == folder
    final = install("kites", folder)
    assert (final / "weights.npz").read_bytes() == b"weights"


def test_a_damaged_file_that_is_no_table_is_noticed(card, publish):
    folder = publish(with_weights(card, publish))
    (folder / "weights.npz").write_bytes(b"weighty")
    [found] = problems(read_manifest("kites"), folder)
    assert re.search("weights.npz: changed; expected 7 bytes, .* got 7 bytes", found)
    (folder / "weights.npz").unlink()
    assert problems(read_manifest("kites"), folder) == [f"{folder / 'weights.npz'}: missing"]


def test_tables_beside_other_files_are_still_checked(card, publish):
    card = with_weights(card, publish)
    card["files"]["test.parquet"]["rows"] = 17
    [found] = problems(read_manifest_of(card, publish), publish(card))
    assert found.endswith("test.parquet: 16 rows, the manifest says 17")


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("train.parquet", {}),
        ("train.parquet", {"rows": 16}),
        ("train.parquet", {"columns": ["label"]}),
        ("weights.npz", {"rows": 16}),
        ("weights.npz", {"columns": ["label"]}),
        ("weights.npz", {"rows": 16, "columns": ["label"]}),
    ],
)
def test_rows_and_columns_go_with_tables_and_with_nothing_else(card, publish, name, held):
    card = with_weights(card, publish)
    entry = card["files"][name]
    card["files"][name] = {"sha256": entry["sha256"], "size": entry["size"], **held}
    publish(card)
    with pytest.raises(ManifestError, match=f"{name}: rows and columns go with a .parquet file"):
        read_manifest("kites")


def test_a_missing_file_is_named(card, publish):
    folder = publish(card)
    (folder / "valid.parquet").unlink()
    with pytest.raises(ManifestError, match="valid.parquet: missing"):
        verified_folder("kites")


def test_all_problems_are_listed_at_once(card, publish):
    folder = publish(card)
    (folder / "valid.parquet").unlink()
    (folder / "test.parquet").write_bytes(b"PAR1")
    found = problems(read_manifest("kites"), folder)
    assert [re.search(r"\w+\.parquet: \w+", line).group() for line in found] == [
        "test.parquet: cut",
        "valid.parquet: missing",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "MIT"}, r"kites.yaml: unknown key 'licens' \(allowed here: checks, citation, .*licence"),
        ({"title": 7}, "key 'title' is '7'"),
        ({"redistribute": "no"}, "key 'redistribute'"),
        ({"files": {}}, "key 'files'"),
        ({"name": "../x"}, "key 'name' is '../x'"),
        (
            {"upstream": [{"repository": "a/b", "commit": "c", "path": "p", "sha256": "xyz"}]},
            "upstream.0.sha256",
        ),
    ],
)
def test_a_manifest_with_a_key_or_value_it_must_not_have_is_refused(card, publish, change, message):
    publish({**card, **change})
    with pytest.raises(ManifestError, match=message):
        read_manifest("kites")


def test_a_manifest_without_a_licence_is_refused(card, publish):
    del card["licence"]
    publish(card)
    with pytest.raises(ManifestError, match="key 'licence' is missing"):
        read_manifest("kites")


@pytest.mark.parametrize("name", ["nothing", "../kites", "/etc/passwd", "kites.yaml", ""])
def test_an_unknown_name_lists_those_there_are(card, publish, name):
    publish(card)
    with pytest.raises(ManifestError, match="no manifest named .*; there are: kites"):
        read_manifest(name)


def test_a_set_that_is_not_here_says_where_it_was_looked_for_and_what_to_do(
    card, publish, tmp_path, monkeypatch
):
    publish(card)
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ManifestError) as caught:
        verified_folder("kites")
    for part in (
        tmp_path / "elsewhere",
        tmp_path / "cache" / "data",
        "workbench data prepare kites --source",
    ):
        assert str(part) in str(caught.value)


def test_folders_are_searched_in_order_and_the_cache_last(card, publish, tmp_path, monkeypatch):
    publish(card)
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache" / "data"
    monkeypatch.setenv("WORKBENCH_DATA", os.pathsep.join([str(one), "", str(two)]))
    assert search_folders() == [one, two, cache]
    assert locate("kites") is None
    for folder in (cache, two, one):  # each one found in preference to those made before it
        (folder / "kites").mkdir(parents=True)
        assert locate("kites") == folder / "kites"


def test_without_the_variable_only_the_cache_is_searched(publish, tmp_path, monkeypatch):
    monkeypatch.delenv("WORKBENCH_DATA")
    assert search_folders() == [tmp_path / "cache" / "data"]


def test_installing_copies_the_described_files_into_the_cache(card, publish, tmp_path, monkeypatch):
    source = publish(card)
    (source / "notes.txt").write_text("not part of the set")
    final = install("kites", source)
    monkeypatch.delenv("WORKBENCH_DATA")
    assert verified_folder("kites") == final == tmp_path / "cache" / "data" / "kites"
    assert sorted(os.listdir(final)) == sorted(card["files"])
    assert os.listdir(final.parent) == ["kites"]


def test_installing_what_does_not_match_installs_nothing(card, publish, tmp_path):
    source = publish(card)
    (source / "test.parquet").write_bytes(b"<html>please log in</html>")
    with pytest.raises(
        ManifestError, match="does not hold kites as its manifest describes it: .*test.parquet"
    ):
        install("kites", source)
    assert not (tmp_path / "cache").exists()


def test_installing_on_a_full_disk_keeps_what_was_there_and_leaves_nothing_half(
    card, publish, tmp_path, monkeypatch
):
    source = publish(card)
    final = install("kites", source)
    real, copied = manifests.shutil.copyfile, []

    def fill(one, other):
        if copied:
            raise OSError(28, "No space left on device")
        copied.append(real(one, other))

    with monkeypatch.context() as patch:
        patch.setattr(manifests.shutil, "copyfile", fill)
        with pytest.raises(RunError, match="the disk is full"):
            install("kites", source)
    assert copied
    assert os.listdir(final.parent) == ["kites"]
    assert problems(read_manifest("kites"), final) == []


def test_every_shipped_manifest_is_valid_and_complete():
    assert "e2e-cond" in manifest_names()
    for name in manifest_names():
        manifest = read_manifest(name)
        assert manifest.name == name
        assert len(manifest.intended_use) > 20
        assert manifest.upstream
        for file, expected in manifest.files.items():
            assert not file.endswith(".parquet") or (expected.rows > 0 and expected.columns)


def test_a_folder_of_the_original_publication_has_a_commit_and_no_hash(card, publish):
    publish({**card, "upstream": [{"repository": "a/b", "commit": "c", "path": "images"}]})
    [upstream] = read_manifest("kites").upstream
    assert upstream.sha256 is None


def test_shipped_manifests_name_the_commit_and_hide_no_hash_of_a_single_file():
    for name in manifest_names():
        for one in read_manifest(name).upstream:
            assert re.fullmatch("[0-9a-f]{40}", one.commit), name
            assert one.sha256 or "." not in one.path.rsplit("/", 1)[-1], f"{name}: {one.path}"


def test_every_prepared_set_that_is_here_is_what_its_manifest_says(prepared):
    prepared("tiny-imagenet")
    for name in manifest_names():
        folder = locate(name)
        assert folder is None or problems(read_manifest(name), folder) == []


def test_the_shipped_pair_set_names_the_files_and_columns_that_recipes_read():
    files = read_manifest("e2e-cond").files
    for split in ("train", "valid", "test"):
        assert files[f"{split}.parquet"].columns == ("sentence1", "sentence2", "condition", "label")
