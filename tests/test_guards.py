"""What must stay true of the whole library: what it imports, what starting it costs, who may import whom."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import allrounder as ar

SOURCE = Path(ar.__file__).parent
EXTRAS = (
    "transformers", "peft", "datasets", "huggingface_hub", "PIL", "ray", "accelerate", "tokenizers", "trl", "onnx",
    "onnxruntime",
)  # fmt: skip
MODULES = sorted(
    ".".join(("allrounder", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.name != "__main__.py"
)

IMPORT_ALL = """
import importlib, json, sys
blocked = {blocked!r}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
names = 0
for module in {modules!r}:
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", []):
        getattr(loaded, name)
        names += 1
print(json.dumps({{"names": names, "loaded": sorted(blocked & set(sys.modules))}}))
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_public_name_imports_without_the_extras():
    found = json.loads(run(IMPORT_ALL.format(blocked=set(EXTRAS), modules=MODULES)))
    assert found["names"] > 100
    assert found["loaded"] == []


def test_importing_is_lazy():
    rooms = "import allrounder, sys; print('torch' in sys.modules, 'allrounder.merging' in sys.modules)"
    assert run(rooms).split() == ["False", "False"]
    heavy = ("sklearn", "matplotlib", "pydantic", "rich")
    assert run(f"import sys, allrounder.merging; print([n for n in {heavy} if n in sys.modules])").strip() == "[]"
    script = "import sys\nfrom allrounder.cli import main\nsys.argv = ['allrounder', '--help']\n"
    script += "try:\n    main()\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    assert run(script).split()[-1] == "False"


def cpu_seconds(arguments):
    """CPU time of a command and what it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_starting_costs_little():
    """The least of several runs: load adds to CPU time, nothing takes from it."""
    commands = {
        "torch": [sys.executable, "-c", "import torch"],
        "library": [sys.executable, "-c", "import torch, allrounder; allrounder.save, allrounder.Checkpoint"],
        "help": [sys.executable, "-m", "allrounder", "--help"],
    }
    least = dict.fromkeys(commands, float("inf"))
    for _ in range(8):
        least = {name: min(least[name], cpu_seconds(arguments)) for name, arguments in commands.items()}
        if least["library"] <= least["torch"] + 0.15 and least["help"] <= 0.5:
            break
    assert least["library"] <= least["torch"] + 0.15
    assert least["help"] <= 0.5


FLOORS = {
    "__version__": 0, "errors": 0, "task": 0, "checkpoint": 0, "adapter": 0, "saving": 0, "state": 0, "study": 0,
    "catalogue": 0, "scoring": 1, "train": 1, "nets": 1, "data": 1, "losses": 1, "optim": 1, "merging": 2,
    "multitask": 2, "compression": 2, "continual": 2, "studies": 3, "contest": 3, "multitask_entrants": 3,
    "architecture_entrants": 3, "continual_entrants": 3, "compressors": 3, "entrants": 3, "recipe": 4, "sources": 5,
    "settings": 5, "report": 5, "steps": 6, "run": 7, "cli_output": 8, "cli_compress": 8, "cli": 8, "__main__": 9,
    "__init__": 9,
}  # fmt: skip


def imports(path):
    """(line, first part of the imported module within allrounder) for every import at the top of a file."""
    inside = path.relative_to(SOURCE).parts
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            up = inside[: len(inside) - node.level]
            dotted = [*up, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, (dotted or [alias.name])[0]) for alias in node.names)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_import_from_their_room_or_from_floors_below(path):
    inside = path.relative_to(SOURCE).parts
    own = inside[0].removesuffix(".py")
    for line, room in imports(path):
        assert room == own or FLOORS[room] <= FLOORS[own], f"{path.name}:{line} imports {room} from above"
        assert room != "studies" or own == "studies", f"{path.name}:{line}: nothing imports studies"
