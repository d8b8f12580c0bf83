"""The workspace as a whole: its packages, its lock, what must never be in it."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
UNFINISHED = [path.name for path in PACKAGES if path.name not in ("qdit", "tmpqdm", "oneshot-mpq", "dpk")]
ADDRESS = "://"


def tracked() -> list[Path]:
    """The files that git knows or would take up."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def lock_script():
    loader = SourceFileLoader("lock_script", str(ROOT / "ci" / "lock"))
    spec = spec_from_loader("lock_script", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def test_there_are_ten_packages_and_the_root_installs_them_all():
    assert len(PACKAGES) == 10
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(root["project"]["dependencies"]) == {"papercore", *(path.name for path in PACKAGES)}
    for folder in PACKAGES:
        assert project(folder)["name"] == folder.name
        assert project(folder)["scripts"] == {folder.name: f"{folder.name.replace('-', '_')}.cli:main"}
        assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_packages_say_so(name):
    command = [str(Path(sys.executable).with_name(name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {name} has no working part yet\n"
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{name} {importlib.metadata.version(name)}\n")


@pytest.mark.parametrize("folder", [ROOT / "shared", *PACKAGES], ids=lambda path: path.name)
def test_a_package_declares_what_it_imports(folder):
    """What makes it installable alone: nothing is imported that another package happens to bring along."""
    modules = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
    modules |= {"torch_fidelity": "torch-fidelity", "torch_cka": "torch-cka"}
    extras = project(folder).get("optional-dependencies", {}).values()
    texts = [*project(folder)["dependencies"], *(text for extra in extras for text in extra)]
    declared = {re.split(r"[<>=!~\[; ]", text)[0].lower() for text in texts}
    own = {path.name for path in (folder / "src").iterdir()}

    def imports(part: str) -> set[str]:
        found = set()
        for path in (folder / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    found.add(node.module.partition(".")[0])
        return {modules.get(name, name).lower() for name in found - own - set(sys.stdlib_module_names)}

    foreign = imports("src")
    assert foreign <= declared
    unused = declared - foreign - imports("benchmarks")
    assert unused <= {"papercore", "matplotlib", "scipy", "jaxtyping"}, unused


def test_the_lock_has_no_address_and_every_direct_dependency():
    raw = (ROOT / "uv.lock").read_text()
    text = lock_script().portable(raw)  # a working copy may have been rewritten by uv; what git takes is this
    assert ADDRESS not in text
    assert "[package.metadata" not in text
    locked = set(re.findall(r'^name = "([^"]+)"$', text, re.M))
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [name for folder in (ROOT, ROOT / "shared", *PACKAGES) for name in project(folder)["dependencies"]]
    wanted += [name for group in root["dependency-groups"].values() for name in group]
    assert {re.split(r"[<>=!~\[ ]", text)[0].lower() for text in wanted} <= locked


def test_the_filter_makes_any_lock_portable():
    address = "https" + ADDRESS + "index.example/simple"
    lock = f"""version = 1

[[package]]
name = "a"
version = "1.0"
source = {{ registry = "{address}" }}
dependencies = [
    {{ name = "b", source = {{ registry = "{address}" }} }},
]
sdist = {{ url = "{address}/a.tar.gz", hash = "sha256:0" }}
wheels = [
    {{ url = "{address}/a.whl", hash = "sha256:0" }},
]

[[package]]
name = "b"
version = "0.1"
source = {{ editable = "shared" }}

[package.metadata]
requires-dist = [
    {{ name = "a" }},
]

[package.metadata.requires-dev]
dev = [{{ name = "c" }}]

[[package]]
name = "c"
version = "2"
source = {{ registry = "{address}" }}
"""
    script = lock_script()
    clean = script.portable(lock)
    assert ADDRESS not in clean
    assert clean.count('registry = "index"') == 3
    assert "wheels" not in clean
    assert "requires-dist" not in clean
    assert "requires-dev" not in clean
    assert re.findall(r'name = "(\w)"\nversion', clean) == ["a", "b", "c"]
    assert script.portable(clean) == clean
    piped = subprocess.run(
        [sys.executable, str(ROOT / "ci" / "lock"), "--clean"], input=lock, capture_output=True, text=True, check=True
    )
    assert piped.stdout == clean


def test_git_sees_no_change_when_uv_rewrites_the_lock(tmp_path):
    """The filter works in a repository of its own."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    (tmp_path / "ci").mkdir()
    for name in (".gitattributes", "uv.lock", "ci/lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "ci/lock", "--register"], cwd=tmp_path, check=True)
    git("add", "-A")
    git("commit", "-qm", "x")
    lock = tmp_path / "uv.lock"
    address = "https" + ADDRESS + "index.example"
    lock.write_text(lock.read_text().replace('registry = "index"', f'registry = "{address}"'))
    assert git("diff") == ""
    subprocess.run([sys.executable, "ci/lock", "--register"], cwd=tmp_path, check=True)
    assert git("status", "--porcelain") == ""
    lock.write_text(lock.read_text().replace('name = "torch"', 'name = "torch2"'))
    subprocess.run([sys.executable, "ci/lock", "--register"], cwd=tmp_path, check=True)
    assert git("status", "--porcelain") == " M uv.lock\n"  # a real change is shown, and not staged
    assert address not in git("diff")
    assert address not in git("show", "HEAD:uv.lock")


def test_nothing_names_an_index_or_a_path_of_a_machine():
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "/home" + "/", "/root" + "/", "/work" + "/")
    for path in tracked():
        if path.suffix in (".npz", ".safetensors", ".png") or path.name == "uv.lock":
            continue
        text = path.read_text(encoding="utf-8")
        for host in hosts:
            assert host not in text, f"{path.relative_to(ROOT)} names {host}"


def test_no_file_is_large():
    for path in tracked():
        assert path.stat().st_size <= 2 * 1024**2, path


def test_the_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert "uv run papercore reproduce" in readme
    assert "uv run pytest" in readme
    for folder in PACKAGES:
        assert f"[{folder.name}](packages/{folder.name}/README.md)" in readme
