"""The wheel carries the recipes and configs: built, installed into a fresh environment, used from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from torchft import shipped

ROOT = Path(shipped.__file__).parent.parent


def run(*words: str | Path, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(words, cwd=cwd, env=clean, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_works_where_the_checkout_is_unknown(wheel, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    # The dependencies are this environment's, by path, so that nothing is downloaded. A .pth is not followed twice:
    # an editable install of torchft here stays invisible there.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert run(python, "-c", "import torchft; print(torchft.__file__)", cwd=tmp_path).startswith(str(site))

    tune = environment / "bin" / "tune"
    listing = run(tune, "ls", cwd=tmp_path)
    names = [*shipped.recipes(), *shipped.configs()]
    assert all(name in listing for name in names)
    for i, name in enumerate(names):
        run(tune, "cp", name, f"copy_{i}", cwd=tmp_path)
        (copy,) = tmp_path.glob(f"copy_{i}.*")
        assert copy.read_bytes() == shipped.find(name).read_bytes()
    assert run(tune, "--version", cwd=tmp_path).startswith("torchft 0.")


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    files = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in files} == {"torchft"}
    assert not [name for name in files if name.endswith((".pyc", ".pth", ".pt", ".bin")) or "/tests/" in name]
    shipped_files = [p for part in ("recipes", "configs") for p in (ROOT / part).rglob("*") if p.is_file()]
    missing = {f"torchft/{p.relative_to(ROOT).as_posix()}" for p in shipped_files if p.suffix != ".pyc"} - set(files)
    assert not missing
