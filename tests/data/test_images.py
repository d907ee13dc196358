"""npz sets: what is read, how it is split, and every way in which a file can be wrong."""

import numpy as np
import pytest
import torch

import allrounder as ar
from allrounder.data.images import _grey, _spread, image_suite


def arrays(train=60, test=20, classes=3, shape=(28, 28), seed=0):
    random = np.random.default_rng(seed)
    return {
        "train_x": random.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_y": np.arange(train) % classes,
        "test_x": random.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_y": np.arange(test) % classes,
    }


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "flat.npz", **arrays())
    (tmp_path / "nested").mkdir()
    names = np.array(["cat", "dog"])
    np.savez_compressed(tmp_path / "nested" / "nested.npz", **arrays(classes=2, shape=(32, 40, 3)), class_names=names)
    np.savez(tmp_path / "other.npz", counts=np.zeros(3))
    (tmp_path / "elsewhere").mkdir()
    np.savez(tmp_path / "elsewhere" / "other.npz", counts=np.zeros(3))
    (tmp_path / "elsewhere" / "deep").mkdir()
    np.savez(tmp_path / "elsewhere" / "deep" / "flat.npz", **arrays(classes=5))
    (tmp_path / "second").mkdir()
    np.savez(tmp_path / "second" / "flat.npz", **arrays(classes=5))  # neither flat.npz nor flat/flat.npz
    return tmp_path


def rows(split):
    return {image.numpy().tobytes() for image in split.inputs}


def test_a_folder_of_ones_own_sets(folder):
    suite = image_suite(folder=folder)
    assert list(suite) == ["flat", "nested"]
    assert suite["flat"].outputs == 3
    assert suite["nested"].classes == ("cat", "dog")
    for task in suite.values():
        for split, count in (("train", 48), ("validation", 12), ("test", 20)):
            images, labels = task.split(split)[:]
            assert images.shape == (count, 1, 28, 28)
            assert images.dtype == torch.float32
            assert 0 <= images.min() <= images.max() <= 1
            assert labels.dtype == torch.int64


def test_the_folder_of_the_environment(folder, monkeypatch):
    monkeypatch.setenv("ALLROUNDER_DATA", str(folder))
    assert list(image_suite(["nested"])) == ["nested"]
    monkeypatch.delenv("ALLROUNDER_DATA")
    with pytest.raises(ar.InputError, match="set ALLROUNDER_DATA"):
        image_suite(["nested"])


def test_splits_are_disjoint_and_test_is_the_files_own(folder):
    task = image_suite(["flat"], folder=folder)["flat"]
    original = arrays()
    known = {
        part: {(image / np.float32(255)).tobytes() for image in original[f"{part}_x"]} for part in ("train", "test")
    }
    train, validation, test = rows(task.train), rows(task.validation), rows(task.test)
    assert not train & validation
    assert train | validation == known["train"]
    assert test == known["test"]
    label_of = {(image / np.float32(255)).tobytes(): y for image, y in zip(original["train_x"], original["train_y"])}
    assert all(label_of[image.numpy().tobytes()] == y for image, y in zip(*task.train[:]))


def test_a_seed_says_which_examples(folder):
    first, again, other = (image_suite(["flat"], folder=folder, seed=seed)["flat"] for seed in (1, 1, 2))
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert rows(first.validation) != rows(other.validation)
    assert rows(first.test) == rows(other.test)


def test_sizes_are_at_most_what_was_asked_and_keep_the_shares(tmp_path):
    uneven = arrays(train=500, test=100) | {"train_y": np.repeat([0, 1, 2], [50, 150, 300])}
    np.savez(tmp_path / "uneven.npz", **uneven)
    task = image_suite(folder=tmp_path, train=100, validation=40, test=30)["uneven"]
    assert [len(task.split(name)) for name in ("train", "validation", "test")] == [100, 40, 30]
    for split, size in ((task.train, 100), (task.validation, 40)):
        counts = split.targets.bincount(minlength=3)
        assert (counts - torch.tensor([0.1, 0.3, 0.6]) * size).abs().max() <= 2
    assert len(image_suite(folder=tmp_path, validation=400)["uneven"].validation) == 100  # a fifth
    with pytest.raises(ar.InputError, match="train=0"):
        image_suite(folder=tmp_path, train=0)


def test_every_stretch_of_the_order_holds_the_classes_in_proportion():
    labels = torch.tensor([0] * 900 + [1] * 100)
    order = _spread(labels, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order[labels[order] == 0], torch.arange(900))
    for start in range(0, 1000, 50):
        assert 4 <= labels[order[start : start + 50]].sum() <= 6


def test_colours_become_luma_and_sizes_become_28():
    primaries = torch.zeros(3, 28, 28, 3, dtype=torch.uint8)
    for i in range(3):
        primaries[i, ..., i] = 255
    torch.testing.assert_close(_grey(primaries)[:, 0, 0, 0], torch.tensor([0.299, 0.587, 0.114]))
    assert torch.equal(_grey(primaries[..., :1]), _grey(primaries[..., 0]))
    large = torch.zeros(1, 84, 84, dtype=torch.uint8)
    large[:, :, 1::3] = 255  # where plain bilinear sampling looks: without antialiasing all would be bright
    assert (_grey(large)[..., 2:-2] - 1 / 3).abs().max() < 0.02


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_y": None}, "has no array 'train_y'"),
        ({"train_x": np.zeros((60, 28, 28), np.float32)}, "'train_x' .* must be uint8.*got float32"),
        ({"test_x": np.zeros((20, 784), np.uint8)}, r"'test_x' .* shape \(N, H, W\).*\(20, 784\)"),
        ({"train_x": np.zeros((60, 28, 28, 2), np.uint8)}, r"got \(60, 28, 28, 2\)"),
        ({"test_x": np.zeros((0, 28, 28), np.uint8), "test_y": np.zeros(0, int)}, r"got \(0, 28, 28\)"),
        ({"train_y": np.zeros(60)}, "'train_y' .* must be integers from 0, got float64"),
        ({"train_y": np.array(["a", "b", "c"] * 20)}, "must be integers from 0, got <U1"),
        ({"train_y": np.zeros(59, int)}, r"must have the shape \(60,\)"),
        ({"train_y": np.arange(60) % 3 - 1}, "must be integers from 0, got -1"),
        ({"train_y": np.zeros(60, int)}, "class 1 has fewer"),
        ({"train_y": np.arange(60) % 3 * 2}, "class 1 has fewer"),
        ({"train_y": np.array([0, 2**62] * 30)}, "class 1 has fewer"),
        ({"test_y": np.full(20, 3)}, "'test_y' .* has class 3, which 'train_y' lacks"),
        ({"train_y": np.array([{}] * 60, object)}, "'train_y' of .* was not read .* not objects"),
    ],
)
def test_bad_arrays(tmp_path, change, match):
    content = {key: value for key, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ar.InputError, match=match):
        image_suite(["bad"], folder=tmp_path)


def test_bad_files(folder):
    with pytest.raises(ar.InputError, match=r"no mnist.npz or mnist/mnist.npz; it has flat, nested, other"):
        image_suite(["mnist"], folder=folder)
    with pytest.raises(ar.InputError, match="does not exist"):
        image_suite(folder=folder / "absent")
    with pytest.raises(ar.InputError, match="other.npz' has no array 'train_x'"):
        image_suite(["other"], folder=folder)
    with pytest.raises(ar.InputError, match="at least one task"):
        image_suite([], folder=folder)
    with pytest.raises(ar.InputError, match="no npz file with train_x"):
        image_suite(folder=folder / "elsewhere")
    whole = (folder / "flat.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ar.InputError, match="cut.npz' is not a readable npz file"):
        image_suite(["cut"], folder=folder)
    (folder / "text.npz").write_text("hello")
    with pytest.raises(ar.InputError, match="text.npz' is not a readable npz file"):
        image_suite(["text"], folder=folder)
    with (folder / "bare.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ar.InputError, match="one bare array"):
        image_suite(["bare"], folder=folder)


def test_a_pickle_is_not_run(folder):
    class Trap:
        def __reduce__(self):
            return (folder.joinpath("ran").touch, ())

    import pickle

    trapped = arrays() | {"train_y": np.array([Trap()] * 60, object)}
    np.savez(folder / "trap.npz", **trapped)
    (folder / "raw.npz").write_bytes(pickle.dumps(Trap()))
    for name in ("trap", "raw"):
        with pytest.raises(ar.InputError):
            image_suite([name], folder=folder)
    assert not (folder / "ran").exists()


def test_the_real_sets(data_folder):
    suite = image_suite(folder=data_folder, train=300, validation=60, test=80)
    outputs = {name: task.outputs for name, task in suite.items()}
    assert outputs == {
        "fashion_mnist": 10, "mnist": 10, "notmnist": 10, "omniglot_alphabets": 8, "pneumoniamnist": 2,
        "sign_language_digits": 10, "spoken_digits_mel": 10,
    }  # fmt: skip
    for task in suite.values():
        splits = [rows(split) for split in (task.train, task.validation)]
        assert [len(task.split(name)) for name in ("train", "validation", "test")] == [300, 60, 80]
        assert len(splits[0] & splits[1]) <= 2  # a set may hold one image twice
        assert task.train.targets.unique().numel() == task.outputs
