import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from engm import data as data_cache
from engm.cli import main
from engm.config import RunConfig
from engm.data import Split, batches, load, stratified_order, to_float, with_wrong_labels
from engm.errors import InputError
from engm.evaluation.suite import evaluate_checkpoint
from engm.training import fit


def contents(*splits: Split) -> Counter:
    return Counter(
        (image.numpy().tobytes(), int(label))
        for split in splits
        for image, label in zip(split.images, split.labels, strict=True)
    )


def counts(split: Split) -> list[int]:
    return split.labels.bincount().tolist()


@pytest.fixture
def noise() -> Split:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(1, 256, (300, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(300) % 7)


# --- the digits and their splits


def test_the_splits_share_out_the_digits_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # to the nearest whole number, halves up
    images = ((bunch.images.astype(int) * 255 + 8) // 16).astype(np.uint8)
    everything = Split(torch.from_numpy(images)[:, None], torch.from_numpy(bunch.target).long())
    digits = load("digits")
    assert contents(digits.train, digits.validation, digits.test) == contents(everything)
    assert [len(digits.train), len(digits.validation), len(digits.test)] == [800, 200, 797]
    assert digits.image_shape == (1, 8, 8)
    assert digits.class_names == tuple("0123456789")
    assert digits.num_classes == 10
    assert digits.title == "Digits"
    assert int(digits.train.images.max()) == 255


def test_validation_and_subset_are_even_over_the_classes():
    digits = load("digits", subset=123)
    assert counts(digits.validation) == [20] * 10
    assert sum(counts(digits.train)) == 123
    assert max(counts(digits.train)) - min(counts(digits.train)) == 1
    assert max(counts(digits.test)) - min(counts(digits.test)) == 1


def test_a_subset_is_part_of_a_larger_one_and_leaves_the_rest_alone():
    full, small, large = load("digits"), load("digits", subset=50), load("digits", subset=300)
    assert contents(small.train) <= contents(large.train) <= contents(full.train)
    assert contents(small.validation) == contents(full.validation)
    assert contents(small.test) == contents(full.test)
    assert (small.mean, small.std) == (full.mean, full.std)


def test_fewer_test_images_are_even_over_the_classes_and_part_of_more():
    few, more = load("digits", test=100).test, load("digits", test=200).test
    assert counts(few) == [10] * 10
    assert counts(more) == [20] * 10
    assert contents(few) <= contents(more) <= contents(load("digits").test)


def test_the_wrong_share_of_the_labels_is_wrong_and_the_images_stay(noise):
    tenth, fifth = (with_wrong_labels(noise, part, 7, seed=3).labels for part in (0.1, 0.2))
    assert int((tenth != noise.labels).sum()) == 30
    assert int((fifth != noise.labels).sum()) == 60
    assert torch.equal(fifth[tenth != noise.labels], tenth[tenth != noise.labels])
    assert int(fifth.min()) >= 0 and int(fifth.max()) < 7
    shifts = (with_wrong_labels(noise, 1.0, 7, seed=3).labels - noise.labels) % 7
    assert counts(Split(noise.images, shifts))[0] == 0
    assert min(counts(Split(noise.images, shifts))[1:]) > 25  # of 50: every other class alike
    other = with_wrong_labels(noise, 0.2, 7, seed=4)
    assert not torch.equal(other.labels, fifth)
    assert torch.equal(other.images, noise.images)
    assert torch.equal(with_wrong_labels(noise, 0.0, 7, seed=3).labels, noise.labels)


def test_fewer_classes_are_the_first_ones_whole():
    every, few = load("digits"), load("digits", classes=3, validation=30)
    assert (few.num_classes, few.title) == (3, "Digits, 3 classes")
    assert few.class_names == every.class_names[:3]
    for name in ("train", "validation", "test"):
        assert set(getattr(few, name).labels.tolist()) == {0, 1, 2}
    assert len(few.test) == int((every.test.labels < 3).sum())
    pools = [torch.cat([d.train.labels, d.validation.labels]) for d in (every, few)]
    assert len(pools[1]) == int((pools[0] < 3).sum())
    for count in (1, 11):
        with pytest.raises(InputError, match=f"classes.*{count}"):
            load("digits", classes=count)


def test_the_split_seed_moves_the_validation_images_but_never_the_test_images():
    first, same, other = load("digits"), load("digits"), load("digits", split_seed=1)
    assert torch.equal(first.train.images, same.train.images)
    assert torch.equal(first.validation.images, same.validation.images)
    assert contents(first.validation) != contents(other.validation)
    assert torch.equal(first.test.images, other.test.images)
    assert contents(first.train, first.validation) == contents(other.train, other.validation)


def test_the_splits_are_those_of_every_earlier_run():
    digits = load("digits", subset=300)
    kept = [split.images.numpy().tobytes() for split in (digits.train, digits.validation)]
    digest = hashlib.sha256(b"".join([*kept, digits.test.images.numpy().tobytes()])).hexdigest()
    assert digest[:16] == "143a1e33c34080b0"


def test_mean_and_deviation_are_those_of_all_official_training_images():
    digits = load("digits", subset=10)
    full = load("digits")
    pixels = [
        value / 255
        for split in (full.train, full.validation)
        for value in split.images.flatten().tolist()
    ]
    mean = sum(pixels) / len(pixels)
    variance = sum((value - mean) ** 2 for value in pixels) / len(pixels)
    assert digits.mean == pytest.approx((mean,), rel=1e-12)
    assert digits.std == pytest.approx((variance**0.5,), rel=1e-12)


def test_stratified_order_goes_round_the_classes_until_they_are_used_up():
    labels = np.array([0] * 3 + [1] * 11 + [2] * 7 + [3] * 11, np.uint8)
    order = stratified_order(labels, seed=4)
    assert sorted(order) == list(range(32))
    drawn = [0, 0, 0, 0]
    for label in labels[order]:
        left = [drawn[c] for c in range(4) if drawn[c] < (labels == c).sum()]
        assert drawn[label] == min(left)  # always from a class that is behind
        drawn[label] += 1
    assert not np.array_equal(order, stratified_order(labels, seed=5))


@pytest.mark.parametrize(
    ("wrong", "limits"),
    [
        (dict(subset=801), "1 to 800"),
        (dict(subset=0), "1 to 800"),
        (dict(subset=2.5), "1 to 800"),
        (dict(subset=True), "1 to 800"),
        (dict(subset=901, validation=100), "1 to 900"),
        (dict(validation=1000), "1 to 999"),
        (dict(subset=801), "1 to 800; got 801 .200 of the 1000 training images are for"),
        (dict(test=798), "1 to 797"),
        (dict(split_seed=-1), "0 or more"),
    ],
)
def test_load_names_what_it_cannot_do_and_the_limits(wrong, limits):
    with pytest.raises(
        InputError, match=f"{next(iter(wrong))}(_images)? must be a whole number, {limits}"
    ):
        load("digits", **wrong)


def test_an_unknown_data_set_is_told_the_known_ones():
    with pytest.raises(InputError, match="'cifar'.* digits, fashion-mnist, cifar10"):
        load("cifar")


def test_which_data_sets_are_augmented():
    augmented = {name for name, spec in data_cache.SPECS.items() if spec.augment}
    assert augmented == {"cifar10", "cifar100", "tiny-imagenet"}


# --- splits


def test_take_and_to(noise):
    taken = noise.take([5, 0, 5])
    assert torch.equal(taken.images, noise.images[torch.tensor([5, 0, 5])])
    assert taken.labels.tolist() == [5, 0, 5]
    assert len(noise.take(range(10))) == 10
    assert noise.to("meta").images.device.type == "meta"
    dataset = load("digits").to("meta")
    for split in (dataset.train, dataset.validation, dataset.test):
        assert (split.images.device.type, split.labels.device.type) == ("meta", "meta")


@pytest.mark.parametrize("indices", [[300], [-1], [0.5], [[1]], torch.ones(300, dtype=torch.bool)])
def test_take_refuses_what_is_no_index(noise, indices):
    with pytest.raises(InputError, match="whole numbers from 0 to 299"):
        noise.take(indices)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_a_split_refuses_other_types_and_shapes(images, labels):
    with pytest.raises(InputError, match="a split needs uint8"):
        Split(images, labels)


def test_to_float_is_exact_and_refuses_to_scale_twice():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(every), torch.tensor([v / 255 for v in range(256)]))
    with pytest.raises(InputError, match="uint8"):
        to_float(to_float(every))


# --- batches


def joined(split: Split, size: int = 64, **options) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(batches(split, size, **{"seed": 0, "epoch": 0, **options}))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_an_epoch_holds_every_example_once(noise):
    sizes = [len(y) for _, y in batches(noise, 64, seed=0, epoch=0)]
    assert sizes == [64, 64, 64, 64, 44]
    x, y = joined(noise)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert contents(Split((x * 255).round().byte(), y)) == contents(noise)
    assert not torch.equal(y, noise.labels)


def test_without_shuffling_the_order_is_that_of_the_split(noise):
    x, y = joined(noise, shuffle=False)
    assert torch.equal(x, noise.images.float() / 255)
    assert torch.equal(y, noise.labels)


def test_drop_last_drops_only_what_is_short(noise):
    sizes = [len(y) for _, y in batches(noise, 64, seed=0, epoch=0, drop_last=True)]
    assert sizes == [64] * 4
    sizes = [len(y) for _, y in batches(noise, 100, seed=0, epoch=0, drop_last=True)]
    assert sizes == [100] * 3


@pytest.mark.parametrize("augment", [False, True])
def test_seed_and_epoch_fix_the_batches(noise, augment):
    first = joined(noise, seed=3, epoch=4, augment=augment)
    for one, same in zip(first, joined(noise, seed=3, epoch=4, augment=augment), strict=True):
        assert torch.equal(one, same)
    for seed, epoch in ((3, 5), (4, 4), (4, 3)):
        assert not torch.equal(first[0], joined(noise, seed=seed, epoch=epoch, augment=augment)[0])


def test_the_crops_differ_from_epoch_to_epoch(noise):
    first = joined(noise, epoch=0, shuffle=False, augment=True)[0]
    assert not torch.equal(first, joined(noise, epoch=1, shuffle=False, augment=True)[0])


def test_the_global_random_state_is_left_alone(noise):
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    joined(noise, augment=True)
    load("digits", subset=100)
    assert torch.equal(state, torch.get_rng_state())
    assert np.random.get_state()[1].tobytes() == numpy_state  # noqa: NPY002


def slow_crop(
    image: torch.Tensor, top: int, left: int, mirror: bool, reflect: bool = False
) -> torch.Tensor:
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                i, j = row + top - 4, column + left - 4
                if reflect:
                    i, j = min(abs(i), 2 * height - 2 - i), min(abs(j), 2 * width - 2 - j)
                if 0 <= i < height and 0 <= j < width:
                    target = width - 1 - column if mirror else column
                    result[channel, row, target] = image[channel, i, j]
    return result


def test_every_augmented_image_is_one_of_the_crops_of_its_original():
    # few distinct images, so that the slow loop runs 162 times for each and no more
    generator = torch.Generator().manual_seed(0)
    originals = torch.randint(1, 256, (2, 2, 9, 6), dtype=torch.uint8, generator=generator)
    which = torch.arange(1200) % 2
    x, y = joined(Split(originals[which], which), shuffle=False, augment=True)
    assert torch.equal(y, which)
    drawn = []
    for index, original in enumerate(originals):
        crops = {
            slow_crop(original, top, left, mirror).numpy().tobytes(): (top, left, mirror)
            for top in range(9)
            for left in range(9)
            for mirror in (False, True)
        }
        images = (x[which == index] * 255).round().byte()
        drawn += [crops[image.numpy().tobytes()] for image in images]  # a KeyError is a failure
    # 1200 draws: 133 of each shift expected with a deviation of 11, 600 mirrored with one of 17
    for shifts in ([top for top, _, _ in drawn], [left for _, left, _ in drawn]):
        assert all(85 < count < 185 for count in np.bincount(shifts, minlength=9))
    assert 530 < sum(mirror for _, _, mirror in drawn) < 670
    assert len(set(drawn)) > 155  # all combinations: the three draws do not hang together
    # reflected: the same draws, and other pixels beyond the edge
    reflected, _ = joined(Split(originals[which], which), shuffle=False, augment="reflect")
    for image, draw in zip(reflected[::2][:60], drawn[:60], strict=True):
        expected = slow_crop(originals[0], *draw, reflect=True)
        assert torch.equal((image * 255).round().byte(), expected)


def test_labels_stay_with_their_images_when_shuffled_and_augmented():
    labels = torch.arange(200) % 10
    images = (labels + 1).byte()[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    x, y = joined(Split(images, labels), augment=True)
    assert torch.equal((x.amax((1, 2, 3)) * 255).round().long() - 1, y)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(batch_size=0),
        dict(batch_size=1.5),
        dict(seed=-1),
        dict(epoch=None),
        dict(batch_size=301, drop_last=True),
    ],
)
def test_batches_complains_before_the_first_batch(noise, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        batches(noise, **{"batch_size": 8, "seed": 0, "epoch": 0, **wrong})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_the_same_batches_and_is_not_waited_for(noise):
    expected = joined(noise, augment=True)
    on_gpu = noise.to("cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = joined(on_gpu, augment=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other.cpu())


# --- the cache


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    spec = replace(data_cache.SPECS["cifar10"], train_count=200, test_count=40)
    monkeypatch.setitem(data_cache.SPECS, "cifar10", spec)
    monkeypatch.setenv("ENGM_DATA", str(tmp_path))
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 200), ("test", 40)):
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, 3, 32, 32), np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    names = list(spec.class_names or ())
    record = {"title": "CIFAR-10 (PNG)", "class_names": names, "mean": [0.5] * 3, "std": [0.2] * 3}
    rewrite(tmp_path, arrays, record)
    return tmp_path


def rewrite(folder: Path, arrays: dict | None = None, record: dict | None = None) -> None:
    """Changes the cache and signs it, so that not the checksum alone speaks."""
    cache = folder / "cifar10.npz"
    path = folder / "cifar10.json"
    before = dict(np.load(cache)) if cache.exists() else {}
    known = json.loads(path.read_text()) if path.exists() else {}
    np.savez(cache, **{**before, **(arrays or {})})
    checksum = {"cache_sha256": hashlib.sha256(cache.read_bytes()).hexdigest()}
    path.write_text(json.dumps({**known, **(record or {}), **checksum}))


def test_a_cache_is_loaded_whole(cached):
    arrays = dict(np.load(cached / "cifar10.npz"))
    dataset = load("cifar10")
    assert (dataset.title, dataset.mean, dataset.std) == ("CIFAR-10 (PNG)", (0.5,) * 3, (0.2,) * 3)
    assert counts(dataset.validation) == [2] * 10  # a tenth of the pool
    assert counts(dataset.train) == [18] * 10
    train = Split(
        torch.from_numpy(arrays["train_images"]), torch.from_numpy(arrays["train_labels"]).long()
    )
    assert contents(dataset.train, dataset.validation) == contents(train)
    assert np.array_equal(dataset.test.images, arrays["test_images"])
    assert np.array_equal(dataset.test.labels, arrays["test_labels"])


def test_the_folder_is_the_argument_then_the_variable_then_the_home(cached, monkeypatch, tmp_path):
    assert data_cache.data_root("~/x") == Path.home() / "x"
    assert data_cache.data_root() == cached
    with pytest.raises(InputError, match=r"engm prepare cifar10 --root '.*/a b'"):
        load("cifar10", root=tmp_path / "a b")
    monkeypatch.delenv("ENGM_DATA")
    assert data_cache.data_root() == Path.home() / ".cache" / "engm"
    assert len(load("cifar10", root=cached).test) == 40


def test_a_missing_cache_names_the_command(cached):
    (cached / "cifar10.json").unlink()
    with pytest.raises(InputError, match="not prepared .* `engm prepare cifar10`"):
        load("cifar10")


@pytest.mark.parametrize(("subset", "expected"), [(999, (200, 1000)), (1000, (500, 5000))])
def test_few_images_judge_a_small_subset(subset, expected, monkeypatch):
    images, labels = np.zeros((5000, 3, 2, 2), np.uint8), np.arange(5000) % 10
    arrays = {f"{part}_{k}": v for part in ("train", "test") for k, v in
              (("images", images), ("labels", labels))}  # fmt: skip
    record = dict(class_names="0123456789", title="", mean=[0], std=[1], cache_sha256="")
    monkeypatch.setattr(data_cache, "read_arrays", lambda *_: (dict(arrays), record))
    dataset = load("cifar10", subset=subset)
    assert (len(dataset.validation), len(dataset.test)) == expected
    given = load("cifar10", subset=subset, validation=50, test=40)
    assert (len(given.validation), len(given.test)) == (50, 40)


def cut_short(folder: Path) -> None:
    cache = folder / "cifar10.npz"
    cache.write_bytes(cache.read_bytes()[:-1000])


def change_a_byte(folder: Path) -> None:
    cache = folder / "cifar10.npz"
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content)


def test_a_run_is_resumed_and_evaluated_on_its_own_images_alone(cached):
    counts = dict(subset=20, validation_images=10, test_images=10, batch_size=10)
    small = dict(model="small_cnn", width=4, num_steps=1, eval_steps=1, epochs=1)
    images = dict(subset=20, validation=10, test=10)
    config = RunConfig(dataset="cifar10", **counts, **small)

    def train():
        return fit(config, cached / "runs", device="cpu", progress=False).folder

    folder, digest = train(), json.loads((cached / "cifar10.json").read_text())["cache_sha256"]
    for file in ("config.json", "result.json"):
        assert json.loads((folder / file).read_text())["environment"]["data_sha256"] == digest
    train()  # it is finished
    (cached / "cifar10.json").rename(cached / "away.json")
    train()  # and is shown where its data are gone
    (cached / "away.json").rename(cached / "cifar10.json")
    options = dict(images=10, num_steps=1)
    evaluate_checkpoint(folder, "last", load("cifar10"), **options)
    assert json.loads((folder / "evaluation-last.json").read_text())["data_sha256"] == digest
    rewrite(cached, {"test_images": np.zeros((40, 3, 32, 32), np.uint8)})
    with pytest.raises(InputError, match="a run on other images of that name"):
        train()
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in (counts | small).items()]
    command = ["train", "--dataset=cifar10", *settings, f"--out={cached / 'runs'}"]
    said = CliRunner().invoke(main, command)
    assert said.exit_code == 1 and "a run on other images of that name" in said.output
    assert "showing the finished run" not in said.output
    # images that are given count, not those of the usual folder
    given = replace(load("cifar10", **images), digest=digest)
    assert fit(config, cached / "runs", device="cpu", dataset=given, progress=False)
    for file in ("result.json", "checkpoint-last.pt"):  # as if it had been cut off
        (folder / file).unlink()
    metrics = (folder / "metrics.jsonl").read_bytes()
    for call in (train, lambda: evaluate_checkpoint(folder, "best", load("cifar10"), **options)):
        with pytest.raises(InputError, match="a run on other images of that name.*--data-root"):
            call()
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    # runs from before digests were kept
    values = json.loads((folder / "config.json").read_text())
    del values["environment"]["data_sha256"]
    for old in (values, {**values, "environment": None}):
        (folder / "config.json").write_text(json.dumps(old))
        evaluate_checkpoint(folder, "best", load("cifar10"), **options)
    train()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "cifar10.npz is not what cifar10.json describes"),
        (change_a_byte, "cifar10.npz is not what cifar10.json describes"),
        (lambda folder: (folder / "cifar10.npz").unlink(), "No such file"),
        (lambda folder: (folder / "cifar10.json").write_text("{"), "is not a JSON file"),
        (lambda folder: (folder / "cifar10.json").write_text("[]"), "damaged"),
        (lambda folder: (folder / "cifar10.json").write_text("{}"), "damaged"),
        (lambda folder: rewrite(folder, {"test_labels": np.zeros(39, np.uint8)}), "test_labels"),
        (lambda folder: rewrite(folder, {"train_labels": np.full(200, 10, np.uint8)}), "train_la"),
        (lambda folder: rewrite(folder, {"test_labels": np.zeros(40, np.int64)}), "dtype"),
        (
            lambda folder: rewrite(folder, {"test_images": np.zeros((40, 3, 32, 31), np.uint8)}),
            "test_images",
        ),
        (lambda folder: rewrite(folder, record={"mean": [0.5]}), "mean"),
        (lambda folder: rewrite(folder, record={"std": [0.2, 0, 0.2]}), "std"),
        (lambda folder: rewrite(folder, record={"class_names": list("abcdefghij")}), "class_names"),
        (lambda folder: rewrite(folder, record={"title": 3}), "title"),
    ],
)
def test_a_damaged_cache_says_how_to_make_it_anew(cached, damage, message):
    damage(cached)
    with pytest.raises(InputError, match=message) as caught:
        load("cifar10")
    assert "`engm prepare cifar10`" in str(caught.value)
    assert "make it anew" in str(caught.value)


def test_a_pickle_in_the_cache_is_not_run(cached, tmp_path):
    trap = tmp_path / "trap"
    rewrite(cached, {"test_labels": np.array([Malicious(trap)], object)})
    with pytest.raises(InputError, match="damaged"):
        load("cifar10")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # the trap works


# --- torchvision


@pytest.mark.parametrize(
    ("complaint", "output"),
    [
        ("operator torchvision::nms does not exist", "imported after nms, qnms\n"),
        ("another fault", ""),
    ],
)
def test_missing_operators_are_declared_and_other_faults_are_not_hidden(
    tmp_path, complaint, output
):
    (tmp_path / "torchvision.py").write_text(
        "import torch\n"
        "there = [n for n in ('nms', 'qnms') if hasattr(torch.ops.torchvision, n)]\n"
        f"if not there: raise RuntimeError('{complaint}')\n"
        "print('imported after', ', '.join(there))\n"
    )
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import engm.preparation.vision"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == output
    assert ("another fault" in run.stderr) == (not output)


def test_the_real_torchvision_is_handed_on():
    from engm.preparation.vision import torchvision

    assert torchvision.datasets.CIFAR10.base_folder == "cifar-10-batches-py"
