"""`allrounder merge` and `allrounder restore`: accounts, and bad input: one sentence, exit code 2, no trace on disk."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from allrounder import cli
from allrounder.checkpoint import Checkpoint
from allrounder.saving import save


def model(seed=0, like=None):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (6, 4), "layer.weight": (4, 4), "layer.bias": (4,), "step": ()}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if like is not None:
        weights = {name: like[name] + 0.1 * value for name, value in weights.items()}
    return weights


@pytest.fixture
def folder(tmp_path):
    base = model()
    for i, label in enumerate(("base", "a", "b")):
        save(model(i, base) if i else base, tmp_path / label)
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: exit code, output, error output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["allrounder", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run


def trace(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def fails(command, folder):
    """One sentence with these words, exit code 2, nothing printed, nothing changed on disk."""

    def check(*words, says, restore=False):
        before = trace(folder)
        ends = words if restore else ("merge", *words, "--out", folder / "new" / "out")
        code, out, err = command(*ends, "--json")
        assert code == 2, err
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        for word in [says] if isinstance(says, str) else says:
            assert word in err, f"{word!r} is not in {err!r}"
        assert trace(folder) == before

    return check


def test_merge_and_restore_print_an_account(command, folder):
    words = ("merge", folder / "base", folder / "a", folder / "b")
    code, out, err = command(
        *words, "--method", "task_arithmetic", "--option", "scale=0.5", "--out", folder / "o", "--json"
    )
    assert code == 0
    assert err == "", "no progress bar beside JSON"
    account = json.loads(out)
    assert account["options"] == {"scale": 0.5}
    assert account["files"] == ["config.json", "model.safetensors"]
    assert account["bytes"] == (folder / "o" / "model.safetensors").stat().st_size
    base, a, b = (Checkpoint(folder / name) for name in ("base", "a", "b"))
    found = Checkpoint(folder / "o")
    for name in base:
        torch.testing.assert_close(found[name], base[name] + 0.5 * (a[name] + b[name] - 2 * base[name]))
    code, out, _ = command(*words, "--method", "tall-masks", "--out", folder / "archive")
    assert code == 0
    assert "tall-masks of 2 experts" in out
    code, out, _ = command("restore", folder / "archive", "a", "--out", folder / "back", "--dtype", "bf16", "--json")
    assert code == 0
    assert json.loads(out)["files"] == ["config.json", "model.safetensors"]
    assert Checkpoint(folder / "back")["layer.bias"].dtype == torch.bfloat16
    code, out, err = command(*words[:3], words[2], "--method", "average", "--out", folder / "same")
    assert code == 0
    assert "note: experts 'a' and 'a-2' are identical" in err


def test_shards_and_jobs_from_the_command_line(command, folder):
    words = ("merge", folder / "base", folder / "a", folder / "b", "--method", "ties", "--jobs", "2")
    assert command(*words, "--shard-size", "70B", "--out", folder / "many")[0] == 0
    assert command(*words, "--out", folder / "one")[0] == 0
    index = json.loads((folder / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    one, many = Checkpoint(folder / "one"), Checkpoint(folder / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_models_that_cannot_be_read(fails, folder):
    good = (folder / "base", folder / "a")
    fails(folder / "gone", folder / "a", "--method", "ties", says=("gone' does not exist", "give a"))
    fails(folder / "base", "no/such/model", "--method", "ties", says="'no/such/model' does not exist")
    file = folder / "a" / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-3], content[:20], b"", content[:8] + b"\xff" * 30 + content[38:]):
        file.write_bytes(damaged)
        fails(
            *good,
            "--method",
            "average",
            says=("a/model.safetensors' is not a whole safetensors file", "copy or export"),
        )
        fails(folder / "a", folder / "b", "--method", "average", says="a/model.safetensors' is not a whole")
    file.write_bytes(content)
    index = folder / "b" / "model.safetensors.index.json"
    (folder / "b" / "model.safetensors").rename(folder / "b" / "part.safetensors")
    for shard, says in (("gone.safetensors", "which is missing"), ("../a/model.safetensors", "not a plain file name")):
        index.write_text(json.dumps({"weight_map": {"embed.weight": "part.safetensors", "layer.bias": shard}}))
        fails(*good, folder / "b", "--method", "average", says=(shard, says))


def test_models_that_do_not_fit(fails, folder):
    base = model()

    def expert(change, *says):
        weights = {name: value.clone() for name, value in base.items()}
        change(weights)
        save_file(weights, folder / "odd.safetensors")
        for method in ("average", "ties", "tall-masks"):
            words = (folder / "base", folder / "a", folder / "odd.safetensors", "--method", method)
            fails(*words, says=("expert 'odd'", *says))

    expert(lambda w: w.pop("layer.bias"), "not of the base's architecture", "lacks 'layer.bias'")
    expert(lambda w: w.update({"head.weight": torch.zeros(2)}), "has 'head.weight' besides")
    expert(
        lambda w: w.update({"layer.weight": torch.zeros(4, 5)}), "'layer.weight' of shape (4, 5), the base has (4, 4)"
    )
    expert(lambda w: w.update({"embed.weight": torch.zeros(7, 4)}), "(7, 4)", "another vocabulary?")
    for value in (float("nan"), float("inf"), -float("inf")):
        expert(
            lambda w, value=value: w["layer.weight"].__setitem__((2, 1), value),
            "NaN or infinite values in 'layer.weight'",
        )
    other = {f"block.{i}.weight": torch.zeros(2) for i in range(9)}
    save_file(other, folder / "odd.safetensors")
    says = (
        "lacks 'embed.weight', 'layer.bias', 'layer.weight' and 1 more",
        "has 'block.0.weight'",
        "6 more tensors besides",
    )
    fails(folder / "base", folder / "odd.safetensors", "--method", "average", says=says)
    broken = {**base, "layer.bias": torch.full((4,), float("nan"))}
    save_file(broken, folder / "odd.safetensors")
    says = "the base has NaN or infinite values in 'layer.bias'"
    fails(folder / "odd.safetensors", folder / "a", "--method", "task-arithmetic", says=says)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_code_never_runs(name, fails, folder):
    proof = folder / "proof"
    torch.save({**model(1), "bomb": Bomb(proof)}, folder / name)
    fails(folder / "base", folder / name, "--method", "average", says=(name, "pickled code is never run"))
    fails(folder / name, folder / "a", "--method", "average", says="pickled code is never run")
    assert not proof.exists()
    torch.load(folder / name, weights_only=False)
    assert proof.exists(), "the payload is real"


def test_wrong_words(fails, folder):
    good = (folder / "base", folder / "a", folder / "b")
    fails(*good, "--method", "tais", says="no method is called 'tais'; did you mean 'ties'?")
    fails(*good, "--method", "regmean", says="'regmean' needs data and heads; use it with a recipe: allrounder run")
    fails(*good, "--method", "ties", "--option", "denisty=0.1", says="did you mean 'density'?")
    fails(*good, "--method", "ties", "--option", "density", says="an option is written key=value, got 'density'")
    fails(*good, "--method", "ties", "--option", "density=2", says="density is a share in (0, 1], got 2")
    fails(*good, "--method", "ties", "--dtype", "fp8", says="dtype is fp32, bf16, fp16 or fp64, got 'fp8'")
    fails(*good, "--method", "ties", "--shard-size", "many", says="a shard size is a number with")
    fails(*good, "--method", "negate", says="negate takes 1 (expert) of experts, got 2")


def test_usage_errors_exit_2_too(command, folder):
    for words in (
        ("merge", folder / "base", "--method", "ties", "--out", folder / "o"), ("merge",), ("mrege",),
        ("merge", folder / "base", folder / "a", "--method", "ties"),
        ("merge", folder / "base", folder / "a", "--method", "ties", "--out", folder / "o", "--jobs", "0"),
    ):  # fmt: skip
        code, out, err = command(*words)
        assert code == 2
        assert not (folder / "o").exists()
        assert "Traceback" not in out + err


def test_outputs_that_cannot_be_written(command, folder):
    before = trace(folder)
    full, file = folder / "a", folder / "a" / "model.safetensors"
    for out, says in (
        (full, "exists and is not an empty folder"), (file, "exists and is not an empty folder"),
        (file / "out", "cannot write"), ("/proc/none/out", "cannot write"), (folder / ("x" * 400), "cannot write"),
    ):  # fmt: skip
        for method in ("average", "tall-masks"):
            words = ("merge", folder / "base", folder / "a", folder / "b", "--method", method, "--out", out)
            code, _, err = command(*words, "--json")
            assert code == 2, err
            assert says in err
            assert len(err.strip().splitlines()) == 1
    assert trace(folder) == before


def test_archives_that_do_not_belong_together(fails, command, folder):
    words = (folder / "base", folder / "a", folder / "b", "--method", "tall-masks")
    assert command("merge", *words, "--out", folder / "archive", "--json")[0] == 0

    def restore(task, *says):
        fails("restore", folder / "archive", task, "--out", folder / "new" / "out", says=says, restore=True)

    restore("aa", "the archive has no task 'aa'", "did you mean 'a'?")
    fails("restore", folder / "base", "a", "--out", folder / "new", says="is no TALL-masks archive", restore=True)
    fails(folder / "archive", folder / "a", "--method", "average", says=("is an archive", "allrounder restore"))
    own = folder / "archive" / "base" / "model.safetensors"
    kept = own.read_bytes()
    own.write_bytes((folder / "b" / "model.safetensors").read_bytes())  # another model of the same shapes
    restore("a", "was not made with these weights in 'base'")
    save_file({**load_file(own), "layer.weight": torch.zeros(5, 4)}, own)
    restore("a", "do not fit its base in 'layer.weight'")
    own.write_bytes(kept[:-5])
    restore("a", "not a whole safetensors file")
    own.write_bytes(kept)
    (folder / "archive" / "archive.json").write_text("{")
    restore("a", "is not the head of an archive")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
from allrounder.cli import main
sys.argv = ["allrounder", *sys.argv[1:]]
main()
"""


def started(*words, code=None):
    line = [sys.executable, *(("-c", code) if code else ("-m", "allrounder")), *map(str, words)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}

    def interruptible():  # a shell's background job ignores interrupts, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible
    )


def test_a_full_disk_is_one_sentence_in_a_process_of_its_own(folder):
    before = trace(folder)
    words = ("merge", folder / "base", folder / "a", "--method", "average", "--out", folder / "out", "--json")
    process = started(*words, code=LIMITED)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: no space for")
    assert len(err.strip().splitlines()) == 1
    assert trace(folder) == before


SLOW = """
import sys, time
import allrounder.saving as writing
whole = writing._write
def slow(file, content, at):
    print("writing", flush=True)
    time.sleep(0.2)
    return whole(file, content, at)
writing._write = slow
from allrounder.cli import main
sys.argv = ["allrounder", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_leaves_nothing(jobs, folder):
    before = trace(folder)
    words = (
        "merge",
        folder / "base",
        folder / "a",
        "--method",
        "average",
        "--out",
        folder / "new" / "out",
        "--jobs",
        jobs,
    )
    process = started(*words, "--json", code=SLOW)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert trace(folder) != before, "it is at work"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip() == "interrupted; start the same command again to continue"
    assert trace(folder) == before


def test_help_does_not_import_torch():
    check = "import sys; from allrounder.cli import main; sys.argv = ['allrounder', *sys.argv[1:]]\ntry: main()\n"
    check += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    for words in (("--help",), ("merge", "--help"), ("restore", "--help")):
        process = started(*words, code=check)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "Usage" in out
