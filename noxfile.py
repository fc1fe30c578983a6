"""``make matrix``: one wheel a Python, built on the newest torch, and with it a cut of the suite on every torch.

A session, `nox -s "matrix-3.11(torch='2.12')"`, takes 6 GB of disk while it runs, and some five minutes.
"""

import shutil
from pathlib import Path

import nox

NEEDS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["test"]
TORCHES = ["2.15", "2.14", "2.13", "2.12", "2.11", "2.10"]
CUT = "ops edges gradients max_pool blocks resnet fuse fuse_changes fusing folding inference pooling recompute"
CUT += " synchronized watchers"


@nox.session(python=["3.10", "3.11", "3.12", "3.13"], venv_backend="venv")
@nox.parametrize("torch", TORCHES)
def matrix(session, torch):
    if (session.python, torch) == ("3.10", "2.15"):
        session.skip("torch 2.15 is not built for Python 3.10")
    session.install(f"torch=={torch}.*", *NEEDS)
    wheels = Path(".nox", "wheels", session.python)
    if not wheels.exists():
        session.install("setuptools>=77", "ninja", "pybind11", "packaging")
        build = "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), "."
        session.run(*build, env={"FORCE_CUDA": "0"})
    (wheel,) = (path.resolve() for path in wheels.iterdir())
    session.install("--no-deps", str(wheel))
    outside = Path(session.create_tmp())
    for folder in ("tests", "benchmarks"):
        shutil.copytree(folder, outside / folder, dirs_exist_ok=True)
    shutil.copy("pyproject.toml", outside)  # pytest's part of it
    session.chdir(outside)
    tests = [f"tests/test_{name}.py" for name in CUT.split()]
    selected = "-m", "not slow and not expensive and not gpu", "-k", "not emulated"
    session.run("pytest", "-q", "-n", "2", *selected, *tests)
    shutil.rmtree(session.virtualenv.location)
