"""Data set layouts: each is recognised, listed with the right labels and split, or refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines import formats
from pipelines.formats import Options, Source, SourceCase
from pipelines.formats import phantom as phantom_format
from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import SYNAPSE

BENCHMARK = (*range(1, 11), *range(21, 41))
TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
Touch = Callable[..., Path]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """Make files under the source: listing a layout opens no image."""

    def make(*names: str, text: str = "") -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


def read(source: Path, name: str = "auto", **options: object) -> Source:
    return formats.read(source, name, Options(output=source / "out", **options))  # type: ignore[arg-type]


def splits(source: Source) -> dict[str, list[str]]:
    return {s: [case.name for case in source.cases if case.split == s] for s in ("train", "val", "test")}


def btcv(touch: Touch, numbers: tuple[int, ...]) -> Path:
    return touch(*(f"{kind}/{kind}{n:04d}.nii.gz" for n in numbers for kind in ("img", "label")))


def test_every_module_of_the_package_is_a_format() -> None:
    files = {path.stem for path in Path(formats.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(formats.formats()) == files
    assert files >= {"phantom", "synapse", "folder", "nnunet", "totalsegmentator"}


def test_a_source_of_no_format_is_told_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"fits no known format.*synapse \(img/img0001") as refused:
        read(tmp_path)
    assert refused.value.code == "format"
    with pytest.raises(BadConfig, match="dicomdir"):
        read(tmp_path, "dicomdir")


def test_a_source_of_two_formats_must_be_named(touch: Touch) -> None:
    source = btcv(touch, (1,))
    touch("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "dataset.json")
    with pytest.raises(BadInput, match=r"several formats; .* among nnunet \(.*\), synapse \(.*\)\.$"):
        read(source)


def test_synapse_has_the_18_12_benchmark_with_validation_carved_from_the_18(touch: Touch) -> None:
    source = read(btcv(touch, BENCHMARK))
    assert (source.format, source.organs, source.public) == ("synapse", SYNAPSE, True)
    found = splits(source)
    assert found["test"] == [f"case{n:04d}" for n in TEST]
    assert len(found["val"]) == 3 and len(found["train"]) == 15
    assert found == splits(read(btcv(touch, BENCHMARK)))
    drawn = {tuple(splits(read(btcv(touch, BENCHMARK), seed=seed))["val"]) for seed in range(5)}
    assert len(drawn) > 1


def test_raw_synapse_values_become_benchmark_organs_by_name(touch: Touch) -> None:
    (file,) = read(btcv(touch, (5,))).cases[0].labels
    raw = np.arange(14)
    np.testing.assert_array_equal(file.map.apply(raw, "x"), [0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 0, 8, 0, 0])


def test_btcv_layout_with_other_numbers_gets_the_generic_split(touch: Touch) -> None:
    source = read(btcv(touch, tuple(range(51, 61))))
    assert {name: len(cases) for name, cases in splits(source).items()} == {"train": 7, "val": 1, "test": 2}
    assert source.benchmark_test == frozenset()


@pytest.mark.parametrize("extra", ["img/img0007.nii.gz", "label/label0007.nii.gz"])
def test_an_image_without_label_or_the_reverse_is_refused(extra: str, touch: Touch) -> None:
    source = btcv(touch, (5, 6))
    touch(extra)
    with pytest.raises(BadInput, match="0007") as refused:
        read(source)
    assert refused.value.code == "unpaired"


def test_a_stray_file_and_a_doubled_case_are_refused(touch: Touch) -> None:
    source = btcv(touch, (5,))
    touch("img/notes0001.nii.gz")
    with pytest.raises(BadInput, match="notes0001"):
        read(source)
    (source / "img/notes0001.nii.gz").unlink()
    touch("label/label0005.nii")
    with pytest.raises(BadInput, match="label0005"):
        read(source)


def test_two_files_of_one_number_are_refused(touch: Touch) -> None:
    source = btcv(touch, (2,))
    touch("img/img2.nii.gz", "label/label2.nii.gz")
    with pytest.raises(BadInput, match=r"img2\.nii\.gz.*img0002\.nii\.gz|img0002\.nii\.gz.*img2\.nii\.gz") as refused:
        read(source)
    assert refused.value.code == "ambiguous"


def test_long_numbers_may_be_patients_and_stay_private(touch: Touch) -> None:
    assert read(btcv(touch, (7, 9999))).public
    assert not read(btcv(touch, (12345678,))).public


def test_an_ending_may_be_in_capitals(touch: Touch, tmp_path: Path) -> None:
    source = touch("img/img0005.NII.GZ", "label/label0005.nii")
    assert [case.image.name for case in read(source).cases] == ["img0005.NII.GZ"]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (10, (7, 1, 2)), (50, (35, 5, 10))]
)
def test_the_generic_split_is_by_case_and_seeded(count: int, expected: tuple[int, ...], touch: Touch) -> None:
    source = btcv(touch, tuple(range(100, 100 + count)))
    found = splits(read(source))
    assert tuple(map(len, found.values())) == expected
    assert found == splits(read(source))
    if count == 50:
        assert found != splits(read(source, seed=1))


def test_the_users_split_wins_and_leaves_unnamed_cases_out(touch: Touch, tmp_path: Path) -> None:
    source = btcv(touch, (5, 6, 7, 1))
    told = tmp_path / "split.yaml"
    told.write_text("train: [case0006]\nval: [case0005]\ntest: [case0001]\n")
    assert splits(read(source, split=told)) == {"train": ["case0006"], "val": ["case0005"], "test": ["case0001"]}


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        ("train: [case0005, case0099]", BadInput, "split"),
        ("train: [case0001]", BadInput, "test-leak"),
        ("val: [case0001]", BadInput, "test-leak"),
        ("train: [case0005]\nval: [case0005]", BadConfig, "split"),
        ("training: [case0005]", BadConfig, "split"),
        ("train: case0005", BadConfig, "split"),
        ("[case0005]", BadConfig, "yaml"),
        ("train: [", BadConfig, "yaml"),
    ],
)
def test_a_wrong_split_is_refused(text: str, error: type[Exception], code: str, touch: Touch, tmp_path: Path) -> None:
    (tmp_path / "split.yaml").write_text(text)
    with pytest.raises(error) as refused:
        read(btcv(touch, (1, 5, 6)), split=tmp_path / "split.yaml")
    assert refused.value.code == code  # type: ignore[attr-defined]


def test_a_yaml_table_names_other_organs(touch: Touch, tmp_path: Path) -> None:
    table = tmp_path / "table.yaml"
    table.write_text("6: liver\n1: spleen\n8:\n")
    source = read(btcv(touch, (5,)), labels=str(table))
    assert source.organs == ("spleen", "liver")
    np.testing.assert_array_equal(source.cases[0].labels[0].map.apply(np.array([0, 1, 6, 8]), "x"), [0, 1, 2, 0])
    table.write_text("aorta: vessel\ninferior_vena_cava: vessel\n")
    source = read(btcv(touch, (5,)), labels=str(table))
    np.testing.assert_array_equal(source.cases[0].labels[0].map.apply(np.arange(14), "x")[[8, 9, 1]], [1, 1, 0])


@pytest.mark.parametrize("text", ["1: [liver]", "- liver", "heart: heart", "1: liver\nspleen: spleen", ""])
def test_a_wrong_label_table_is_refused(text: str, touch: Touch, tmp_path: Path) -> None:
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises((BadConfig, BadInput)):
        read(btcv(touch, (5,)), labels=str(tmp_path / "table.yaml"))


def test_folder_pairs_by_what_the_star_matched(touch: Touch, tmp_path: Path) -> None:
    touch("ct/pat_a_ct.nii.gz", "ct/pat_b_ct.nii.gz", "seg/a/mask.nii.gz", "seg/b/mask.nii.gz", "seg/._b/x.nii.gz")
    (tmp_path / "t.yaml").write_text("1: liver")
    source = read(tmp_path, image="ct/pat_*_ct.nii.gz", label="seg/*/mask.nii.gz", labels=str(tmp_path / "t.yaml"))
    pairs = [(c.name, c.image.name, c.labels[0].path.parent.name) for c in source.cases]
    assert source.format == "folder" and not source.public
    assert pairs == [("a", "pat_a_ct.nii.gz", "a"), ("b", "pat_b_ct.nii.gz", "b")]


def test_folder_pairs_by_names_without_known_prefixes_and_suffixes(touch: Touch, tmp_path: Path) -> None:
    touch("i/img007_0000.nii.gz", "i/case9.nii.gz", "l/label007_seg.nii.gz", "l/9_gt.nii.gz")
    (tmp_path / "t.yaml").write_text("1: liver")
    source = read(tmp_path, image="i/*.nii.gz", label="l/*.nii.gz", labels=str(tmp_path / "t.yaml"))
    assert [(c.image.name, c.labels[0].path.name) for c in source.cases] == [
        ("img007_0000.nii.gz", "label007_seg.nii.gz"),
        ("case9.nii.gz", "9_gt.nii.gz"),
    ]


def test_folder_never_guesses(touch: Touch, tmp_path: Path) -> None:
    touch("i/a.nii.gz", "i/b.nii.gz", "l/a.nii.gz", "m/img1.nii.gz", "m/case1.nii.gz")
    (tmp_path / "t.yaml").write_text("1: liver")
    table = str(tmp_path / "t.yaml")
    with pytest.raises(BadInput, match="no label"):
        read(tmp_path, image="i/*.nii.gz", label="l/*.nii.gz", labels=table)
    with pytest.raises(BadInput, match="would both be 1"):
        read(tmp_path, image="m/*.nii.gz", label="l/*.nii.gz", labels=table)
    with pytest.raises(BadConfig, match="--labels"):
        read(tmp_path, image="i/*.nii.gz", label="l/*.nii.gz")
    with pytest.raises(BadInput, match="--labels"):
        read(tmp_path, image="i/*.nii.gz", label="l/*.nii.gz", labels="synapse")
    for pattern in ("../*.nii.gz", "/etc/*", "**/*.nii.gz"):
        with pytest.raises(BadConfig, match="inside SOURCE"):
            read(tmp_path, image=pattern, label="l/*.nii.gz", labels=table)


@pytest.mark.parametrize(
    ("labels", "channels"),
    [
        ({"0": "background", "1": "liver", "2": "Right Kidney"}, {"modality": {"0": "CT"}}),
        ({"background": 0, "liver": 1, "Right Kidney": 2}, {"channel_names": {"0": "CT"}}),
    ],
)
def test_nnunet_reads_both_styles_of_its_description(labels: dict, channels: dict, touch: Touch) -> None:
    source = touch("imagesTr/liver_1_0000.nii.gz", "imagesTr/._liver_1_0000.nii.gz", "labelsTr/liver_1.nii.gz")
    touch("imagesTr/liver_2.nii.gz", "labelsTr/liver_2.nii.gz", "imagesTs/liver_9.nii.gz")
    touch("dataset.json", text=json.dumps({"labels": labels, **channels}))
    listed = read(source)
    assert (listed.format, listed.organs) == ("nnunet", ("liver", "Right Kidney"))
    assert [case.name for case in listed.cases] == ["liver_1", "liver_2"]  # a test image without label is no case
    mapped = read(source, labels="synapse")
    assert mapped.organs == SYNAPSE
    np.testing.assert_array_equal(mapped.cases[0].labels[0].map.apply(np.arange(3), "x"), [0, 5, 2])
    touch("labelsTs/liver_9.nii.gz")
    assert splits(read(source)) == {"train": ["liver_1", "liver_2"], "val": [], "test": ["liver_9"]}


@pytest.mark.parametrize(
    ("description", "code"),
    [
        ({"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT", "1": "PET"}}, "channels"),
        ({"labels": {"background": 0, "liver": [1, 2]}}, "layout"),
        ({"labels": {"background": 0, "ignore": 1}}, "layout"),
        ({"name": "no labels"}, "layout"),
        ([], "layout"),
    ],
)
def test_nnunet_refuses_what_it_cannot_mean(description: object, code: str, touch: Touch) -> None:
    source = touch("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    touch("dataset.json", text=json.dumps(description))
    with pytest.raises(BadInput) as refused:
        read(source)
    assert refused.value.code == code


def test_nnunet_refuses_a_second_channel_file(touch: Touch) -> None:
    source = touch("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    touch("dataset.json", text=json.dumps({"labels": {"liver": 1}}))
    with pytest.raises(BadInput, match="second channel"):
        read(source)


TOTAL = ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta", "pancreas")


def test_totalsegmentator_reads_one_file_per_organ(touch: Touch) -> None:
    names = [f"segmentations/{organ}.nii.gz" for organ in (*TOTAL, "heart", "rib_left_1")]
    source = touch(*(f"s{n:04d}/{name}" for n in (1, 2) for name in ["ct.nii.gz", *names]))
    listed = read(source)
    assert (listed.format, listed.organs) == ("totalsegmentator", SYNAPSE)
    assert [case.name for case in listed.cases] == ["s0001", "s0002"]
    kidney = next(file for file in listed.cases[0].labels if file.path.name == "kidney_right.nii.gz")
    np.testing.assert_array_equal(kidney.map.apply(np.array([0, 1]), "x"), [0, SYNAPSE.index("right_kidney") + 1])
    assert len(listed.cases[0].labels) == 8
    (source / "s0002/segmentations/aorta.nii.gz").unlink()
    with pytest.raises(BadInput, match="lacks aorta"):
        read(source)


def test_totalsegmentator_takes_the_split_of_its_meta_table(touch: Touch) -> None:
    source = touch(
        *(f"{s}/{n}" for s in ("s1", "s2") for n in ["ct.nii.gz", *(f"segmentations/{o}.nii.gz" for o in TOTAL)])
    )
    touch("meta.csv", text="image_id;age;split\ns1;50;train\ns2;60;test\n")
    assert splits(read(source)) == {"train": ["s1"], "val": [], "test": ["s2"]}
    touch("meta.csv", text="image_id;age;split\ns1;50;train\n")
    with pytest.raises(BadInput, match="s2"):
        read(source)
    touch("meta.csv", text="image_id,split\ns1,train\ns2,holdout\n")
    with pytest.raises(BadInput, match="holdout"):
        read(source)


def test_the_class_table_of_a_multi_label_file_is_read_or_told_never_guessed(shared_data: Path) -> None:
    case = shared_data / "ct-case-a"
    v1, v2 = "labels_total_v1_104class.nii.gz", "labels_total_v2_fast_117class.nii.gz"
    with pytest.raises(BadInput, match=r"give --labels TABLE.yaml, or for .* --classes v1"):
        read(case, label=v1)
    with pytest.raises(BadInput, match="not v1"):
        read(case, label=v2, classes="v1")
    with pytest.raises(BadConfig, match="v3"):
        read(case, label=v1, classes="v3")
    with pytest.raises(BadInput, match="--label"):
        read(case)
    told, own = (read(case, label=v1, classes="v1"), read(case, label=v2))
    raw = np.array([1, 2, 3, 4, 5, 6, 7, 10, 52])
    np.testing.assert_array_equal(told.cases[0].labels[0].map.apply(raw, "x"), [1, 2, 3, 4, 5, 6, 7, 8, 0])
    np.testing.assert_array_equal(own.cases[0].labels[0].map.apply(raw, "x"), [1, 2, 3, 4, 5, 6, 8, 0, 7])


@pytest.mark.parametrize(
    ("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (8, (5, 1, 2)), (16, (10, 2, 4))]
)
def test_phantoms_are_listed_without_being_made(count: int, expected: tuple[int, ...], tmp_path: Path) -> None:
    source = formats.read(Path("phantom"), "auto", Options(output=tmp_path, cases=count))
    assert tuple(map(len, splits(source).values())) == expected
    assert all(case.generate for case in source.cases) and list(tmp_path.iterdir()) == []
    assert source.organs == SYNAPSE and source.public


def test_phantom_seeds_differ_between_seeds_and_from_pre_training() -> None:
    seeds = [phantom_format.patient_seed(seed, n) for seed in (*range(3), 99, 100, 101, 250) for n in range(1, 100)]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & set(phantom_format.PRETRAINING_SEEDS)


def test_phantoms_are_made_once_and_again_for_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, seeds: list[int], first_id: int) -> None:
        for kind in ("img", "label"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{kind}{first_id:04d}.nii.gz").write_text(str(seeds[0]))

    def waiting(seed: int) -> list[SourceCase]:
        source = formats.read(Path("phantom"), "auto", Options(output=tmp_path, cases=2, seed=seed))
        return [case for case in source.cases if case.generate]

    monkeypatch.setattr("pipelines.phantom.write", write)
    first, second = waiting(seed=3)
    assert first.generate and second.generate
    first.generate()
    assert [case.name for case in waiting(seed=3)] == [second.name]
    second.generate()
    assert waiting(seed=3) == [] and len(waiting(seed=4)) == 2
    assert second.image.read_text() == "30002"
