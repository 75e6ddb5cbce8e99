"""The rooms of the package: which imports which, and that the picture of them is today's."""

import ast
import shutil
import subprocess
import sys

import pytest
from toy_task import COMMANDS, REPOSITORY

PACKAGE = REPOSITORY / "fairseq_smoe"


def lint_imports(folder):
    return subprocess.run(
        [COMMANDS / "lint-imports", "--no-cache", REPOSITORY / "tests" / "imports.ini"],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_imports_run_downwards():
    done = lint_imports(REPOSITORY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module, imported, contract",
    [
        ("moe/strata.py", "fairseq_smoe.files", "Imports run downwards"),
        ("translation/model.py", "fairseq_smoe.training.trainer", "What fairseq registers"),
        ("training/compat.py", "fairseq_smoe.commands.path", "Nothing imports the commands"),
        ("moe/strata.py", "fairseq_smoe.moe.block", "No cycles"),
    ],
)
def test_the_contract_sees_a_wrong_import(module, imported, contract, tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "fairseq_smoe")
    with open(copy / module, "a") as file:
        file.write(f"\nimport {imported}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith(contract) for line in broken), done.stdout


@pytest.mark.parametrize("path", sorted((PACKAGE / "moe").rglob("*.py")), ids=lambda p: p.stem)
def test_the_layer_imports_torch_and_errors_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            own = name.startswith(("fairseq_smoe.moe", "fairseq_smoe.errors"))
            assert own or package == "torch" or package in sys.stdlib_module_names, (path, name)


def test_the_picture_is_todays():
    drawn = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "draw_rooms.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert drawn.stdout == (REPOSITORY / "docs" / "rooms.svg").read_text()
